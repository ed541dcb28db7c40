// Steps 7 and 8: the anchors of each merge pool by density peaks, and the anchor that each token joins.
//
// One warp works on one entry of the context list, which is one row of the Gram matrix.
#include "primitives.cuh"

namespace tango {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBatch = 4;  // vectors of four values that a lane loads at once

struct Row {
    int entry;  // in the context list
    int i;      // in the pool
    int pool;
    const float* gram;
};

// Finds the row of this warp; false if it has none. Strips store whole tiles, packed matrices store entries, of which
// each strip has as many as it has rows.
__device__ bool find_row(const Job& job, int strip, Row& row) {
    const int stored = blockIdx.x * kWarps + warp_id();
    if (*job.packed) {
        row.entry = strip * job.strip_tile_rows * kTile + stored;
        if (row.entry >= *job.context_count) return false;
        row.pool = job.entry_pool[row.entry];
        if (row.pool < 0) return false;
        const MergePool& pool = job.merge_pool[row.pool];
        row.i = row.entry - pool.first;
        row.gram = job.gram + pool.gram + static_cast<size_t>(row.i) * pool.ld;
    } else {
        const int t = strip * job.strip_tile_rows + stored / kTile;
        if (t >= *job.tile_rows) return false;
        const TileRow tile = job.tile_row[t];
        row.pool = tile.pool;
        row.i = tile.index * kTile + stored % kTile;
        if (row.i >= job.merge_pool[row.pool].count) return false;
        row.entry = job.merge_pool[row.pool].first + row.i;
        row.gram = job.gram + static_cast<size_t>(stored) * job.ld;
    }
    return true;
}

int rows_per_launch(const Job& job) { return job.strips == 1 ? job.N : job.strip_tile_rows * kTile; }

// Four values from j on; `otherwise` replaces those from n on.
__device__ float4 load_four(const float* values, int j, int n, float otherwise) {
    if (j + 3 < n) return *reinterpret_cast<const float4*>(values + j);
    return make_float4(j < n ? values[j] : otherwise, j + 1 < n ? values[j + 1] : otherwise,
                       j + 2 < n ? values[j + 2] : otherwise, otherwise);
}

__device__ void unpack(const float4& four, float (&values)[4]) {
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
}

template <int kRegisters>
__global__ void __launch_bounds__(kThreads) find_row_densities(Job job, int strip) {
    Row row;
    if (!find_row(job, strip, row)) return;
    const MergePool pool = job.merge_pool[row.pool];
    const int n = pool.count;
    const float* norm = job.norm + pool.aligned;
    const float own = norm[row.i];
    KSmallest<kRegisters> nearest(min(job.neighbors, n - 1));
    float max_sq_dist = 0.0f;
    for (int start = 0; start < n; start += 4 * kWarp * kBatch) {
        float4 products[kBatch], norms[kBatch];
#pragma unroll
        for (int a = 0; a < kBatch; ++a) {
            const int j = start + 4 * (a * kWarp + lane_id());
            products[a] = load_four(row.gram, j, n, 0.0f);
            norms[a] = load_four(norm, j, n, 0.0f);
        }
        float distance[kBatch][4], min_of_four[kBatch];
#pragma unroll
        for (int a = 0; a < kBatch; ++a) {
            const int j = start + 4 * (a * kWarp + lane_id());
            const bool all_count = j + 3 < n && (row.i < j || row.i > j + 3);
            float other[4];
            unpack(products[a], distance[a]);
            unpack(norms[a], other);
            min_of_four[a] = INFINITY;
#pragma unroll
            for (int v = 0; v < 4; ++v) {
                distance[a][v] = squared_distance(own, other[v], distance[a][v]);
                const bool counts = all_count || (j + v < n && j + v != row.i);
                if (counts) max_sq_dist = fmaxf(max_sq_dist, distance[a][v]);
                if (!counts) distance[a][v] = INFINITY;
                min_of_four[a] = fminf(min_of_four[a], distance[a][v]);
            }
        }
        if (start == 0 && nearest.k <= kWarp) {  // a bound from one value per lane, which excludes most others
            float min_of_all = min_of_four[0];
#pragma unroll
            for (int a = 1; a < kBatch; ++a) min_of_all = fminf(min_of_all, min_of_four[a]);
            nearest.set_bound(warp_kth(min_of_all, nearest.k));
        }
#pragma unroll
        for (int a = 0; a < kBatch; ++a)
            if (__any_sync(kAllLanes, min_of_four[a] < nearest.limit))
#pragma unroll
                for (int v = 0; v < 4; ++v) nearest.offer(distance[a][v]);
    }
    max_sq_dist = warp_max(max_sq_dist);
    const float mean = nearest.sum() / nearest.k;
    if (lane_id() == 0) {
        job.knn_mean_sq_dist[pool.aligned + row.i] = mean;
        // Distances are not negative, so their bits have the same order.
        atomicMax(reinterpret_cast<int*>(&job.max_sq_dist[row.pool]), __float_as_int(max_sq_dist));
    }
}

__global__ void __launch_bounds__(kThreads) find_row_deltas(Job job, int strip) {
    Row row;
    if (!find_row(job, strip, row)) return;
    const MergePool pool = job.merge_pool[row.pool];
    const int n = pool.count;
    const float *norm = job.norm + pool.aligned, *knn_mean_sq_dist = job.knn_mean_sq_dist + pool.aligned;
    const float own = norm[row.i], own_knn = knn_mean_sq_dist[row.i];
    float delta = INFINITY;
    for (int start = 0; start < n; start += 4 * kWarp * kBatch) {
        float4 products[kBatch], norms[kBatch], knns[kBatch];
#pragma unroll
        for (int a = 0; a < kBatch; ++a) {
            const int j = start + 4 * (a * kWarp + lane_id());
            products[a] = load_four(row.gram, j, n, 0.0f);
            norms[a] = load_four(norm, j, n, 0.0f);
            knns[a] = load_four(knn_mean_sq_dist, j, n, INFINITY);
        }
#pragma unroll
        for (int a = 0; a < kBatch; ++a) {
            const int j = start + 4 * (a * kWarp + lane_id());
            float product[4], other[4], of[4];
            unpack(products[a], product);
            unpack(norms[a], other);
            unpack(knns[a], of);
#pragma unroll
            for (int v = 0; v < 4; ++v)
                if (of[v] < own_knn || (of[v] == own_knn && j + v < row.i))
                    delta = fminf(delta, squared_distance(own, other[v], product[v]));
        }
    }
    delta = warp_min(delta);
    if (lane_id() == 0)
        job.score[row.entry] = expf(-own_knn) * sqrtf(delta == INFINITY ? job.max_sq_dist[row.pool] : delta);
}

// An entry's rank by descending score is the number of entries before it.
__global__ void __launch_bounds__(kThreads) rank_scores(Job job) {
    const int entry = blockIdx.x * kWarps + warp_id();
    if (entry >= *job.context_count || job.entry_pool[entry] < 0) return;
    const MergePool pool = job.merge_pool[job.entry_pool[entry]];
    const int i = entry - pool.first;
    if (lane_id() == 0 && i < pool.anchors) job.anchor_slot[pool.anchor_row + i] = entry;
    const float own = job.score[entry];
    int rank = 0;
#pragma unroll 8
    for (int other = pool.first + lane_id(); other < entry; other += kWarp) rank += job.score[other] >= own;
#pragma unroll 8
    for (int other = entry + 1 + lane_id(); other < pool.first + pool.count; other += kWarp)
        rank += job.score[other] > own;
    rank = warp_sum(rank);
    if (lane_id() == 0 && rank < pool.anchors) {
        job.anchors[pool.first + rank] = i;
        job.anchor_tokens[pool.first + rank] = job.context[entry];
    }
}

__device__ void join(const Job& job, const MergePool& pool, int entry, const Nearest& nearest) {
    // If all distances are NaN, the entry joins the first anchor.
    const int anchor = nearest.index < pool.count ? nearest.index : job.anchors[pool.first];
    job.owner[entry] = anchor;
    atomicAdd(&job.member_rows[pool.first + anchor], pool.frames);
}

// For packed matrices, which are symmetric: a lane has an entry and goes down the anchors' rows, so that a warp reads
// contiguous elements. The warps of a block share the anchors.
__global__ void __launch_bounds__(kThreads) nearest_anchors(Job job) {
    __shared__ Nearest per_warp[kWarps][kWarp];
    if (!*job.packed) return;
    const int entry = blockIdx.x * kWarp + lane_id();
    const int number = entry < *job.context_count ? job.entry_pool[entry] : -1;
    MergePool pool = {};
    if (number >= 0) pool = job.merge_pool[number];
    const float *norm = job.norm + pool.aligned, *gram = job.gram + pool.gram;
    const int i = entry - pool.first;
    const float own = number >= 0 ? norm[i] : 0.0f;
    Nearest nearest = {INFINITY, pool.count};
#pragma unroll 8
    for (int a = warp_id(); a < (number >= 0 ? pool.anchors : 0); a += kWarps) {
        const int j = job.anchors[pool.first + a];
        const float product = gram[static_cast<size_t>(j) * pool.ld + i];
        nearest.offer(squared_distance(own, norm[j], product), j);
    }
    per_warp[warp_id()][lane_id()] = nearest;
    __syncthreads();
    if (warp_id() != 0 || number < 0) return;
    for (int w = 1; w < kWarps; ++w) nearest.offer(per_warp[w][lane_id()].distance, per_warp[w][lane_id()].index);
    join(job, pool, entry, nearest);
}

// For a strip, where an entry's products with the anchors are contiguous: a warp has an entry.
__global__ void __launch_bounds__(kThreads) nearest_anchors_of_strip(Job job, int strip) {
    Row row;
    if (*job.packed || !find_row(job, strip, row)) return;
    const MergePool pool = job.merge_pool[row.pool];
    const float* norm = job.norm + pool.aligned;
    const float own = norm[row.i];
    Nearest nearest = {INFINITY, pool.count};
#pragma unroll 4
    for (int a = lane_id(); a < pool.anchors; a += kWarp) {
        const int j = job.anchors[pool.first + a];
        nearest.offer(squared_distance(own, norm[j], row.gram[a]), j);
    }
    nearest = warp_nearest(nearest);
    if (lane_id() == 0) join(job, pool, row.entry, nearest);
}

}  // namespace

cudaError_t find_densities(const Job& job, cudaStream_t stream) {
    const int blocks = ceil_div(rows_per_launch(job), kWarps);
    cudaError_t error = gram(job, Pairs::kSymmetric, 0, stream);
    if (job.strips > 1 && error == cudaSuccess) error = gram(job, Pairs::kDiagonal, 0, stream);
    for (int strip = 0; strip < job.strips && error == cudaSuccess; ++strip) {
        if (job.strips > 1) error = gram(job, Pairs::kStrip, strip, stream);
        if (error != cudaSuccess) break;
        if (job.neighbors <= kWarp)
            find_row_densities<1><<<blocks, kThreads, 0, stream>>>(job, strip);
        else
            find_row_densities<2><<<blocks, kThreads, 0, stream>>>(job, strip);
        error = cudaGetLastError();
    }
    return error;
}

cudaError_t find_deltas(const Job& job, cudaStream_t stream) {
    const int blocks = ceil_div(rows_per_launch(job), kWarps);
    cudaError_t error = cudaSuccess;
    for (int strip = 0; strip < job.strips && error == cudaSuccess; ++strip) {
        if (job.strips > 1) error = gram(job, Pairs::kStrip, strip, stream);
        if (error != cudaSuccess) break;
        find_row_deltas<<<blocks, kThreads, 0, stream>>>(job, strip);
        error = cudaGetLastError();
    }
    return error;
}

cudaError_t find_anchors(const Job& job, cudaStream_t stream) {
    rank_scores<<<ceil_div(job.N, kWarps), kThreads, 0, stream>>>(job);
    return cudaGetLastError();
}

cudaError_t find_owners(const Job& job, cudaStream_t stream) {
    nearest_anchors<<<ceil_div(job.N, kWarp), kThreads, 0, stream>>>(job);
    cudaError_t error = cudaGetLastError();
    if (job.strips == 1) return error;
    const int blocks = ceil_div(rows_per_launch(job), kWarps);
    for (int strip = 0; strip < job.strips && error == cudaSuccess; ++strip) {
        error = gram(job, Pairs::kAnchors, strip, stream);
        if (error != cudaSuccess) break;
        nearest_anchors_of_strip<<<blocks, kThreads, 0, stream>>>(job, strip);
        error = cudaGetLastError();
    }
    return error;
}

}  // namespace tango
