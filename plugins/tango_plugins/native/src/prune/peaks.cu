// Steps 7 and 8: the anchors of each merge pool by density peaks, and the anchor that each of its tokens joins.
//
// One warp works on one entry of the context list, that is on one row of the Gram matrix.
#include "device.cuh"

namespace tango {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kAhead = 4;  // groups of four values that a lane loads before it looks at them

struct Row {
    int entry;  // in the context list
    int i;      // in the pool
    int pool;
    const float* gram;
};

// The row of this warp; false where there is none. Strips store whole tiles, the complete matrix stores entries.
__device__ bool find_row(const Job& job, int strip, Row& row) {
    const int stored = blockIdx.x * kWarps + warp_id();
    if (job.strips == 1) {
        if (stored >= *job.context_count) return false;
        row.entry = stored;
        row.pool = job.entry_pool[stored];
        if (row.pool < 0) return false;
        row.i = stored - job.merge_pool[row.pool].first;
    } else {
        const int t = strip * job.strip_tile_rows + stored / kTile;
        if (stored / kTile >= job.strip_tile_rows || t >= *job.tile_rows) return false;
        const TileRow tile = job.tile_row[t];
        row.pool = tile.pool;
        row.i = tile.index * kTile + stored % kTile;
        if (row.i >= job.merge_pool[row.pool].count) return false;
        row.entry = job.merge_pool[row.pool].first + row.i;
    }
    row.gram = job.gram + static_cast<size_t>(stored) * job.ld;
    return true;
}

int rows_per_launch(const Job& job) { return job.strips == 1 ? job.N : job.strip_tile_rows * kTile; }

// Four values from j on, those at n and after it replaced.
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
__global__ void __launch_bounds__(kThreads) spread_of_rows(Job job, int strip) {
    Row row;
    if (!find_row(job, strip, row)) return;
    const MergePool pool = job.merge_pool[row.pool];
    const int n = pool.count;
    const float* norm = job.norm + pool.aligned;
    const float own = norm[row.i];
    Smallest<kRegisters> nearest(min(job.neighbors, n - 1));
    float widest = 0.0f;
    for (int start = 0; start < n; start += 4 * kWarp * kAhead) {
        float4 products[kAhead], norms[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
            const int j = start + 4 * (a * kWarp + lane_id());
            products[a] = load_four(row.gram, j, n, 0.0f);
            norms[a] = load_four(norm, j, n, 0.0f);
        }
        float distance[kAhead][4], least[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
            const int j = start + 4 * (a * kWarp + lane_id());
            const bool all_count = j + 3 < n && (row.i < j || row.i > j + 3);
            float other[4];
            unpack(products[a], distance[a]);
            unpack(norms[a], other);
            least[a] = INFINITY;
#pragma unroll
            for (int v = 0; v < 4; ++v) {
                distance[a][v] = squared_distance(own, other[v], distance[a][v]);
                const bool counts = all_count || (j + v < n && j + v != row.i);
                if (counts) widest = fmaxf(widest, distance[a][v]);
                if (!counts) distance[a][v] = INFINITY;
                least[a] = fminf(least[a], distance[a][v]);
            }
        }
        if (start == 0 && nearest.k <= kWarp) {  // one value of each lane bounds them: few others need to be looked at
            float least_of_all = least[0];
#pragma unroll
            for (int a = 1; a < kAhead; ++a) least_of_all = fminf(least_of_all, least[a]);
            nearest.expect(warp_kth(least_of_all, nearest.k));
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a)
            if (__any_sync(kAllLanes, least[a] < nearest.limit))
#pragma unroll
                for (int v = 0; v < 4; ++v) nearest.show(distance[a][v]);
    }
    widest = warp_max(widest);
    const float mean = nearest.sum() / nearest.k;
    if (lane_id() == 0) {
        job.spread[pool.aligned + row.i] = mean;
        // Distances are not negative: their bits order as they do.
        atomicMax(reinterpret_cast<int*>(&job.widest[row.pool]), __float_as_int(widest));
    }
}

__global__ void __launch_bounds__(kThreads) delta_of_rows(Job job, int strip) {
    Row row;
    if (!find_row(job, strip, row)) return;
    const MergePool pool = job.merge_pool[row.pool];
    const int n = pool.count;
    const float *norm = job.norm + pool.aligned, *spread = job.spread + pool.aligned;
    const float own = norm[row.i], own_spread = spread[row.i];
    float delta = INFINITY;
    for (int start = 0; start < n; start += 4 * kWarp * kAhead) {
        float4 products[kAhead], norms[kAhead], spreads[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
            const int j = start + 4 * (a * kWarp + lane_id());
            products[a] = load_four(row.gram, j, n, 0.0f);
            norms[a] = load_four(norm, j, n, 0.0f);
            spreads[a] = load_four(spread, j, n, INFINITY);
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
            const int j = start + 4 * (a * kWarp + lane_id());
            float product[4], other[4], of[4];
            unpack(products[a], product);
            unpack(norms[a], other);
            unpack(spreads[a], of);
#pragma unroll
            for (int v = 0; v < 4; ++v)
                if (of[v] < own_spread || (of[v] == own_spread && j + v < row.i))
                    delta = fminf(delta, squared_distance(own, other[v], product[v]));
        }
    }
    delta = warp_min(delta);
    if (lane_id() == 0)
        job.score[row.entry] = expf(-own_spread) * sqrtf(delta == INFINITY ? job.widest[row.pool] : delta);
}

// An entry's place by falling score is the number of entries before it.
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
    // No distance at all is NaN: the first anchor has it.
    const int anchor = nearest.index < pool.count ? nearest.index : job.anchors[pool.first];
    job.owner[entry] = anchor;
    atomicAdd(&job.member_rows[pool.first + anchor], pool.frames);
}

// With the complete matrix, which is symmetric: a lane has an entry and goes down the anchors' rows, so that the warp
// reads whole lines of them; the warps of a block share the anchors.
__global__ void __launch_bounds__(kThreads) nearest_anchors(Job job) {
    __shared__ Nearest of_warp[kWarps][kWarp];
    const int entry = blockIdx.x * kWarp + lane_id();
    const int number = entry < *job.context_count ? job.entry_pool[entry] : -1;
    MergePool pool = {};
    if (number >= 0) pool = job.merge_pool[number];
    const float* norm = job.norm + pool.aligned;
    const int i = entry - pool.first;
    const float own = number >= 0 ? norm[i] : 0.0f;
    Nearest nearest = {INFINITY, pool.count};
#pragma unroll 8
    for (int a = warp_id(); a < (number >= 0 ? pool.anchors : 0); a += kWarps) {
        const int j = job.anchors[pool.first + a];
        const float product = job.gram[static_cast<size_t>(pool.first + j) * job.ld + i];
        nearest.offer(squared_distance(own, norm[j], product), j);
    }
    of_warp[warp_id()][lane_id()] = nearest;
    __syncthreads();
    if (warp_id() != 0 || number < 0) return;
    for (int w = 1; w < kWarps; ++w) nearest.offer(of_warp[w][lane_id()].distance, of_warp[w][lane_id()].index);
    join(job, pool, entry, nearest);
}

// With a strip, which holds an entry's products with the anchors side by side: a warp has an entry.
__global__ void __launch_bounds__(kThreads) nearest_anchors_of_strip(Job job, int strip) {
    Row row;
    if (!find_row(job, strip, row)) return;
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
    cudaError_t error = job.strips == 1 ? cudaSuccess : gram(job, Pairs::kDiagonal, 0, stream);
    for (int strip = 0; strip < job.strips && error == cudaSuccess; ++strip) {
        error = gram(job, job.strips == 1 ? Pairs::kSymmetric : Pairs::kStrip, strip, stream);
        if (error != cudaSuccess) break;
        if (job.neighbors <= kWarp)
            spread_of_rows<1><<<blocks, kThreads, 0, stream>>>(job, strip);
        else
            spread_of_rows<2><<<blocks, kThreads, 0, stream>>>(job, strip);
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
        delta_of_rows<<<blocks, kThreads, 0, stream>>>(job, strip);
        error = cudaGetLastError();
    }
    return error;
}

cudaError_t find_anchors(const Job& job, cudaStream_t stream) {
    rank_scores<<<ceil_div(job.N, kWarps), kThreads, 0, stream>>>(job);
    return cudaGetLastError();
}

cudaError_t find_owners(const Job& job, cudaStream_t stream) {
    if (job.strips == 1) {
        nearest_anchors<<<ceil_div(job.N, kWarp), kThreads, 0, stream>>>(job);
        return cudaGetLastError();
    }
    const int blocks = ceil_div(rows_per_launch(job), kWarps);
    cudaError_t error = cudaSuccess;
    for (int strip = 0; strip < job.strips && error == cudaSuccess; ++strip) {
        error = gram(job, Pairs::kAnchors, strip, stream);
        if (error != cudaSuccess) break;
        nearest_anchors_of_strip<<<blocks, kThreads, 0, stream>>>(job, strip);
        error = cudaGetLastError();
    }
    return error;
}

}  // namespace tango
