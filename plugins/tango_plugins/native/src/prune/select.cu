// Step 6: selects in each pool salient tokens that differ.
#include "primitives.cuh"

namespace tango {
namespace {

constexpr int kRankThreads = 256;
constexpr int kPeakThreads = 1024;
constexpr int kMaxTokens = TANGO_MAX_TOKENS_PER_FRAME;

// Salience with sinks set to 0; for a static token, its mean over the segment. In fp64 like the reference, because
// means that nearly tie must not tie.
__device__ double salience_at(const Job& job, int first_frame, int frames, int position) {
    if (job.sinks[position / 32] >> (position % 32) & 1) return 0.0;
    double sum = 0.0;
#pragma unroll 8
    for (int f = 0; f < frames; ++f) sum += job.salience[(first_frame + f) * job.L + position];
    return frames == 1 ? sum : sum / frames;
}

// Block p ranks the tokens of pool p by salience, and keeps the candidates.
__global__ void __launch_bounds__(kRankThreads) rank_by_salience(Job job) {
    __shared__ double salience[kMaxTokens];
    __shared__ int position[kMaxTokens];
    const int pool = blockIdx.x;
    const SelectPool size = job.select_pool[pool];
    if (pool < job.F)
        for (int l = threadIdx.x; l < job.L; l += kRankThreads) job.kind[pool * job.L + l] = kUnkept;
    if (size.count == 0 || size.candidates == 0) {
        if (threadIdx.x == 0) job.chosen[pool] = 0;
        return;
    }
    const bool static_pool = pool >= job.F;
    const Segment segment = job.segment[static_pool ? pool - job.F : job.frame_segment[pool]];
    const int frame = static_pool ? segment.first : pool, frames = static_pool ? segment.last - segment.first : 1;
    int* candidates = job.candidates + candidate_base(job, pool);
    int listed = 0;
    for (int start = 0; start < job.L; start += kRankThreads) {
        const int l = start + threadIdx.x;
        const bool mine = l < job.L && is_static(job, segment, l) == static_pool;
        int total;
        const int index = listed + block_exclusive_sum(mine, total);
        if (mine) {
            position[index] = l;
            salience[index] = salience_at(job, frame, frames, l);
            if (index < size.candidates) candidates[index] = frame * job.L + l;  // stays there if salience is NaN
        }
        listed += total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < size.count; i += kRankThreads) {
        const double own = salience[i];
        int rank = 0;
        for (int j = 0; j < size.count; ++j) rank += salience[j] > own || (salience[j] == own && j < i);
        if (rank < size.candidates) candidates[rank] = frame * job.L + position[i];
    }
    if (threadIdx.x == 0) job.chosen[pool] = 0;
}

constexpr int kSmallTile = 32;
constexpr int kGramWarps = 8;
constexpr int kGramBlocksPerPool = 16;

// The 16 bytes of a row that this lane holds for two tensor core instructions. Both operands are permuted along D in
// the same way, so neither shared memory nor shuffles are needed.
__device__ uint4 load_words(const __half* rows, int token, const Job& job, int slice) {
    const size_t at = static_cast<size_t>(token) * job.padded_D + slice * 32 + lane_id() % 4 * 8;
    return *reinterpret_cast<const uint4*>(rows + at);
}

__device__ void multiply(float (&acc)[2][4][4], const uint4 (&a)[4], const uint4 (&b)[4]) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const uint4 upper = a[2 * m], lower = a[2 * m + 1];
            mma(acc[m][n], {upper.x, lower.x, upper.y, lower.y}, {b[n].x, b[n].y});
            mma(acc[m][n], {upper.z, lower.z, upper.w, lower.w}, {b[n].z, b[n].w});
        }
}

// a low_b + low_a b. As in gram.cu, each instruction takes both products of the same columns of D.
__device__ void multiply_crosswise(float (&acc)[2][4][4], const uint4 (&a)[4], const uint4 (&low_a)[4],
                                   const uint4 (&b)[4], const uint4 (&low_b)[4]) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const uint4 upper = a[2 * m], lower = a[2 * m + 1], low_upper = low_a[2 * m], low_lower = low_a[2 * m + 1];
            mma(acc[m][n], {upper.x, lower.x, low_upper.x, low_lower.x}, {low_b[n].x, b[n].x});
            mma(acc[m][n], {upper.y, lower.y, low_upper.y, low_lower.y}, {low_b[n].y, b[n].y});
            mma(acc[m][n], {upper.z, lower.z, low_upper.z, low_lower.z}, {low_b[n].z, b[n].z});
            mma(acc[m][n], {upper.w, lower.w, low_upper.w, low_lower.w}, {low_b[n].w, b[n].w});
        }
}

// Inner products of a pool's candidates, in tiles of 32 x 32. The warps of a block split D.
template <bool kExact>
__global__ void __launch_bounds__(kGramWarps* kWarp) candidate_gram(Job job, int first_frame) {
    __shared__ float partial[kGramWarps][kSmallTile * kSmallTile];
    const int batch_frames = gridDim.y / 2;
    const bool static_pool = static_cast<int>(blockIdx.y) >= batch_frames;
    int pool = first_frame + blockIdx.y;
    if (static_pool) {  // the static pool of the segment that begins at this frame
        const int frame = first_frame + blockIdx.y - batch_frames;
        if (frame >= job.F) return;
        const int s = job.frame_segment[frame];
        if (job.segment[s].first != frame) return;
        pool = job.F + s;
    } else if (pool >= job.F) {
        return;
    }
    const SelectPool size = job.select_pool[pool];
    const int n = size.candidates;
    if (n <= max(size.salient, 1)) return;
    const int base = candidate_base(job, pool);
    const int* tokens = job.candidates + base;
    float* gram = job.gram + static_cast<size_t>(base - first_frame * job.L) * job.candidate_ld;
    const int tiles = ceil_div(n, kSmallTile);
    for (int tile = blockIdx.x; tile < tiles * tiles; tile += gridDim.x) {
        const int row = tile / tiles * kSmallTile, column = tile % tiles * kSmallTile;
        int row_token[4], column_token[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            row_token[i] = tokens[min(row + 8 * i + lane_id() / 4, n - 1)];
            column_token[i] = tokens[min(column + 8 * i + lane_id() / 4, n - 1)];
        }
        float acc[2][4][4] = {};
        for (int slice = warp_id(); slice < job.padded_D / 32; slice += kGramWarps) {
            uint4 a[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                a[i] = load_words(job.rotated_high, row_token[i], job, slice);
                b[i] = load_words(job.rotated_high, column_token[i], job, slice);
            }
            if (kExact) {
                uint4 low_a[4], low_b[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    low_a[i] = load_words(job.rotated_low, row_token[i], job, slice);
                    low_b[i] = load_words(job.rotated_low, column_token[i], job, slice);
                }
                multiply_crosswise(acc, a, low_a, b, low_b);
            }
            multiply(acc, a, b);
        }
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n8 = 0; n8 < 4; ++n8)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int r = 16 * m + 8 * (i / 2) + lane_id() / 4, c = 8 * n8 + 2 * (lane_id() % 4) + i % 2;
                    partial[warp_id()][r * kSmallTile + c] = acc[m][n8][i];
                }
        __syncthreads();
        for (int i = threadIdx.x; i < kSmallTile * kSmallTile; i += kGramWarps * kWarp) {
            float sum = 0.0f;
            for (int w = 0; w < kGramWarps; ++w) sum += partial[w][i];
            const int r = row + i / kSmallTile, c = column + i % kSmallTile;
            if (r < n && c < n) gram[static_cast<size_t>(r) * job.candidate_ld + c] = sum * kGramScale;
        }
        __syncthreads();
    }
}

// Finds density peaks among the candidates of a pool, and selects the most salient candidate of each cluster.
template <int kRegisters>
__global__ void __launch_bounds__(kPeakThreads) choose(Job job, int first_frame, int last_frame) {
    __shared__ float norm[kMaxTokens], knn_mean_sq_dist[kMaxTokens], score[kMaxTokens], warp_max_sq_dist[kWarp];
    __shared__ int rank[kMaxTokens], winner[kMaxTokens];
    constexpr int kWarps = kPeakThreads / kWarp;
    const bool static_pool = static_cast<int>(blockIdx.x) >= last_frame - first_frame;
    int pool = first_frame + blockIdx.x;
    if (static_pool) {
        const int frame = pool - (last_frame - first_frame), s = job.frame_segment[frame];
        if (job.segment[s].first != frame) return;
        pool = job.F + s;
    }
    const SelectPool size = job.select_pool[pool];
    const int n = size.candidates;
    if (n == 0) return;
    const int base = candidate_base(job, pool);
    const int* tokens = job.candidates + base;
    if (n <= max(size.salient, 1)) {  // select them all
        for (int i = threadIdx.x; i < n; i += kPeakThreads) job.kind[tokens[i]] = kSelected;
        if (threadIdx.x == 0) job.chosen[pool] = n;
        return;
    }
    const float* gram = job.gram + static_cast<size_t>(base - first_frame * job.L) * job.candidate_ld;
    for (int i = threadIdx.x; i < n; i += kPeakThreads) {
        norm[i] = gram[static_cast<size_t>(i) * job.candidate_ld + i];
        winner[i] = n;
    }
    __syncthreads();
    float max_sq_dist = 0.0f;
    for (int i = warp_id(); i < n; i += kWarps) {
        const float* row = gram + static_cast<size_t>(i) * job.candidate_ld;
        KSmallest<kRegisters> nearest(min(job.neighbors, n - 1));
        for (int start = 0; start < n; start += kWarp) {
            const int j = start + lane_id();
            const bool other = j < n && j != i;
            const float distance = other ? squared_distance(norm[i], norm[j], row[j]) : 0.0f;
            max_sq_dist = fmaxf(max_sq_dist, distance);
            nearest.offer(other ? distance : INFINITY);
        }
        const float mean = nearest.sum() / nearest.k;
        if (lane_id() == 0) knn_mean_sq_dist[i] = mean;
    }
    max_sq_dist = warp_max(max_sq_dist);
    if (lane_id() == 0) warp_max_sq_dist[warp_id()] = max_sq_dist;
    __syncthreads();
    max_sq_dist = warp_max(warp_max_sq_dist[lane_id() % kWarps]);
    for (int i = warp_id(); i < n; i += kWarps) {
        const float* row = gram + static_cast<size_t>(i) * job.candidate_ld;
        float delta = INFINITY;
        for (int j = lane_id(); j < n; j += kWarp)
            if (knn_mean_sq_dist[j] < knn_mean_sq_dist[i] || (knn_mean_sq_dist[j] == knn_mean_sq_dist[i] && j < i))
                delta = fminf(delta, squared_distance(norm[i], norm[j], row[j]));
        delta = warp_min(delta);
        if (lane_id() == 0) score[i] = expf(-knn_mean_sq_dist[i]) * sqrtf(delta == INFINITY ? max_sq_dist : delta);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kPeakThreads) {
        int before = 0;
        for (int j = 0; j < n; ++j) before += score[j] > score[i] || (score[j] == score[i] && j < i);
        rank[i] = before;
    }
    __syncthreads();
    for (int i = warp_id(); i < n; i += kWarps) {
        const float* row = gram + static_cast<size_t>(i) * job.candidate_ld;
        Nearest center = {INFINITY, kMaxTokens};
        for (int j = lane_id(); j < n; j += kWarp)
            if (rank[j] < size.salient) center.offer(squared_distance(norm[i], norm[j], row[j]), j);
        center = warp_nearest(center);
        if (lane_id() == 0 && center.index < n) atomicMin(&winner[center.index], i);
    }
    __syncthreads();
    // A candidate may win its cluster and be the center of an empty one. It counts once.
    for (int i = threadIdx.x; i < n; i += kPeakThreads)
        if (rank[i] < size.salient) job.kind[tokens[winner[i] < n ? winner[i] : i]] = kSelected;
    __syncthreads();
    int chosen = 0;
    for (int start = 0; start < n; start += kPeakThreads) {
        const int i = start + threadIdx.x;
        chosen += __syncthreads_count(i < n && job.kind[tokens[i]] == kSelected);
    }
    if (threadIdx.x == 0) job.chosen[pool] = chosen;
}

}  // namespace

cudaError_t find_candidates(const Job& job, cudaStream_t stream) {
    rank_by_salience<<<2 * job.F, kRankThreads, 0, stream>>>(job);
    return cudaGetLastError();
}

cudaError_t select(const Job& job, cudaStream_t stream) {
    for (int first = 0; first < job.F; first += job.select_batch) {
        const int frames = min(job.select_batch, job.F - first);
        const dim3 grid(kGramBlocksPerPool, 2 * frames);
        if (job.exact_products)
            candidate_gram<true><<<grid, kGramWarps * kWarp, 0, stream>>>(job, first);
        else
            candidate_gram<false><<<grid, kGramWarps * kWarp, 0, stream>>>(job, first);
        if (job.neighbors <= kWarp)
            choose<1><<<2 * frames, kPeakThreads, 0, stream>>>(job, first, first + frames);
        else
            choose<2><<<2 * frames, kPeakThreads, 0, stream>>>(job, first, first + frames);
    }
    return cudaGetLastError();
}

}  // namespace tango
