// Second half of step 7: the members of each anchor, their mean, and the outputs.
#include "primitives.cuh"

namespace tango {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kEmitThreads = 128;
constexpr int kCompactThreads = 1024;

// A block per anchor, over all pools: lists the rows of X that joined it, and the token where its row will be written.
__global__ void __launch_bounds__(kThreads) gather_members(Job job) {
    __shared__ int sums[2];
    if (blockIdx.x == 0 && threadIdx.x == 0) *job.kept = 0;
    if (static_cast<int>(blockIdx.x) >= *job.anchor_count) return;
    const int slot = job.anchor_slot[blockIdx.x];
    const MergePool pool = job.merge_pool[job.entry_pool[slot]];
    const int* anchors = job.anchors + pool.first;
    const int a = slot - pool.first, anchor = anchors[a], cluster = pool.first + anchor;
    if (threadIdx.x < 2) sums[threadIdx.x] = 0;
    __syncthreads();
    int before = 0, lower = 0;  // rows of the anchors before it in the list; number of anchors of lower index
    for (int other = threadIdx.x; other < pool.anchors; other += kThreads) {
        lower += anchors[other] < anchor;
        if (other < a) before += job.member_rows[pool.first + anchors[other]];
    }
    atomicAdd(&sums[0], before);
    atomicAdd(&sums[1], lower);
    __syncthreads();
    int place = pool.member_row + sums[0];
    if (threadIdx.x == 0) {
        const int position = job.density_order ? anchors[sums[1]] : anchor;
        const int token = job.context[pool.first + position];
        job.kind[token] = kMerged;
        job.source[token] = cluster;
        job.priority[token] = job.score[pool.first + position];
        job.member_start[cluster] = place;
    }
    const int* owner = job.owner + pool.first;
    const int run = ceil_div(pool.count, kThreads), first = threadIdx.x * run, last = min(first + run, pool.count);
    int mine = 0, total;
#pragma unroll 8
    for (int entry = first; entry < last; ++entry) mine += owner[entry] == anchor;
    place += block_exclusive_sum(mine, total) * pool.frames;
    for (int entry = first; mine > 0 && entry < last; ++entry) {
        if (owner[entry] != anchor) continue;
        for (int f = 0; f < pool.frames && place < job.N; ++f, ++place) {
            job.members[place] = job.context[pool.first + entry] + f * job.L;
            job.member_anchor[place] = cluster;
        }
    }
}

// Adds `count` rows of X in order, from row(0) on. It starts the loads of a batch before it adds the first of them.
template <typename T, int kVector, typename Row>
__device__ void add_rows(const Job& job, int count, int column, Row row, float (&sum)[kVector]) {
    constexpr int kBatch = 8;
    using Load = Vector<T, kVector>;
    const T* features = static_cast<const T*>(job.features) + column;
    for (int start = 0; start < count; start += kBatch) {
        Load loads[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            loads[i] = *reinterpret_cast<const Load*>(features + size_t{1} * row(min(start + i, count - 1)) * job.D);
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (start + i < count)
#pragma unroll
                for (int v = 0; v < kVector; ++v) sum[v] += static_cast<float>(loads[i].at[v]);
    }
}

// Adds the rows that `members` lists, fewer than 2 kChunk. All threads of the block must call it.
template <typename T, int kVector>
__device__ void add_members(const Job& job, int from, int to, int column, float (&sum)[kVector]) {
    __shared__ int rows[2 * kChunk];
    __syncthreads();  // an earlier call's rows may still be in use
    if (from + static_cast<int>(threadIdx.x) < to) rows[threadIdx.x] = job.members[from + threadIdx.x];
    __syncthreads();
    if (column < job.D) add_rows<T, kVector>(job, to - from, column, [&](int m) { return rows[m]; }, sum);
}

// Block (c, slice): sums members 32 c to 32 c + 31 if they all joined one anchor. So no block sums more rows than
// these, however large a cluster is, and the order of the additions is fixed.
template <typename T, int kVector>
__global__ void __launch_bounds__(kEmitThreads) sum_chunks(Job job) {
    const int first = blockIdx.x * kChunk, column = (blockIdx.y * kEmitThreads + threadIdx.x) * kVector;
    if (first + kChunk > *job.member_count || job.member_anchor[first] != job.member_anchor[first + kChunk - 1]) return;
    float sum[kVector] = {};
    add_members<T, kVector>(job, first, first + kChunk, column, sum);
    if (column >= job.D) return;
    float* to = job.chunk_sum + static_cast<size_t>(blockIdx.x) * job.D + column;
#pragma unroll
    for (int i = 0; i < kVector; ++i) to[i] = sum[i];
}

// Counts the tokens that the paper's selection kept. Where a token has no density * delta, its priority is its
// salience.
__global__ void __launch_bounds__(kThreads) assign_priorities(Job job) {
    const int token = blockIdx.x * kThreads + threadIdx.x;
    bool kept = false;
    if (token < job.N) {
        const Kind kind = static_cast<Kind>(job.kind[token]);
        const int position = token % job.L;
        kept = kind != kUnkept;
        const bool sink = job.sinks[position / 32] >> (position % 32) & 1;
        if (kind != kMerged) job.priority[token] = sink ? 0.0f : job.salience[token];
    }
    const int count = __syncthreads_count(kept);
    if (threadIdx.x == 0) atomicAdd(job.kept, count);
}

__device__ int stage(uint8_t kind) { return kind == kMerged ? 2 : kind == kUnmerged ? 1 : 0; }

// A warp per token: drops the tokens of lowest priority, or adds those of highest priority, until the count is exact.
__global__ void __launch_bounds__(kThreads) apply_exact_budget(Job job) {
    const int token = blockIdx.x * kWarps + warp_id();
    if (token >= job.N) return;
    const uint8_t kind = job.kind[token];
    const float priority = job.priority[token];
    const int missing = job.exact_count - *job.kept;
    const bool adding = missing > 0;
    uint8_t final_kind = kind;
    if ((kind == kUnkept) == adding && missing != 0) {
        const int own = stage(kind);
        int before = 0;
        for (int other = lane_id(); other < job.N; other += kWarp) {
            const uint8_t other_kind = job.kind[other];
            if ((other_kind == kUnkept) != adding) continue;
            const float other_priority = job.priority[other];
            const int theirs = stage(other_kind);
            before += theirs < own ||
                      (theirs == own && (other_priority > priority || (other_priority == priority && other < token)));
        }
        before = warp_sum(before);
        if (adding)
            final_kind = before < missing ? kAdded : kUnkept;
        else
            final_kind = before < job.exact_count ? kind : kUnkept;
    }
    if (lane_id() == 0) job.final_kind[token] = final_kind;
}

// One block: lists the kept tokens in ascending order, and counts them.
__global__ void __launch_bounds__(kCompactThreads) list_kept(Job job) {
    const uint8_t* kind = job.exact_budget ? job.final_kind : job.kind;
    const int run = ceil_div(job.N, kCompactThreads), first = min(static_cast<int>(threadIdx.x) * run, job.N);
    const int last = min(first + run, job.N);
    int mine = 0, total;
#pragma unroll 8
    for (int token = first; token < last; ++token) mine += kind[token] != kUnkept;
    int place = block_exclusive_sum(mine, total);
    for (int token = first; mine > 0 && token < last; ++token) {
        if (kind[token] == kUnkept) continue;
        if (place < job.capacity) {
            job.indices[place] = token;
            if (job.merged != nullptr) job.merged[place] = kind[token] == kUnmerged || kind[token] == kMerged;
        }
        ++place;
    }
    total = min(total, job.capacity);
    for (int k = total + threadIdx.x; k < job.capacity; k += kCompactThreads) {
        job.indices[k] = -1;
        if (job.merged != nullptr) job.merged[k] = 0;
    }
    if (threadIdx.x == 0) *job.count = total;
}

// Contents of an output row: a row of X, and the members that are merged into it.
struct Output {
    int token, frames;  // the row is averaged over this many frames
    int first, rows;    // range in `members`
};

__device__ Output describe_output(const Job& job, int token) {
    const uint8_t kind = job.exact_budget ? job.final_kind[token] : job.kind[token];
    if (kind == kMerged) {
        const int cluster = job.source[token];
        return {job.context[cluster], job.merge_pool[job.entry_pool[cluster]].frames, job.member_start[cluster],
                job.member_rows[cluster]};
    }
    const Segment segment = job.segment[job.frame_segment[token / job.L]];
    const bool is_static_token = kind != kAdded && is_static(job, segment, token % job.L);
    return {token, is_static_token ? segment.last - segment.first : 1, 0, 0};
}

// Block (k, slice): writes a slice of output row k.
template <typename T, int kVector>
__global__ void __launch_bounds__(kEmitThreads) emit(Job job) {
    using Store = Vector<T, kVector>;
    const int column = (blockIdx.y * kEmitThreads + threadIdx.x) * kVector;
    const bool inside = column < job.D;
    Store out;
#pragma unroll
    for (int i = 0; i < kVector; ++i) out.at[i] = static_cast<T>(0.0f);
    if (static_cast<int>(blockIdx.x) < *job.count) {
        const Output output = describe_output(job, job.indices[blockIdx.x]);
        const int frames = output.frames, rows = output.rows;
        float own[kVector] = {}, sum[kVector] = {};
        if (inside) add_rows<T, kVector>(job, frames, column, [&](int f) { return output.token + f * job.L; }, own);
        float own_weight = 1.0f / frames, row_weight = 0.0f;
        if (rows > frames) {
            const double weight = fmax(static_cast<double>(frames) / rows, job.anchor_weight);
            own_weight = static_cast<float>(weight / frames);
            row_weight = static_cast<float>((1.0 - weight) / rows);
            const int first = output.first, last = first + rows;
            const int whole = ceil_div(first, kChunk), whole_end = last / kChunk;  // chunks within the cluster
            if (whole < whole_end) {
                add_members<T, kVector>(job, first, whole * kChunk, column, sum);
#pragma unroll 8
                for (int chunk = whole; inside && chunk < whole_end; ++chunk) {
                    const float* part = job.chunk_sum + static_cast<size_t>(chunk) * job.D + column;
#pragma unroll
                    for (int i = 0; i < kVector; ++i) sum[i] += part[i];
                }
                add_members<T, kVector>(job, whole_end * kChunk, last, column, sum);
            } else {
                add_members<T, kVector>(job, first, last, column, sum);
            }
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) out.at[i] = static_cast<T>(own_weight * own[i] + row_weight * sum[i]);
    }
    if (!inside) return;
    T* tokens = static_cast<T*>(job.tokens);
    *reinterpret_cast<Store*>(tokens + static_cast<size_t>(blockIdx.x) * job.D + column) = out;
}

template <typename T, int kVector>
void write_tokens(const Job& job, cudaStream_t stream) {
    const int slices = ceil_div(job.D, kEmitThreads * kVector);
    sum_chunks<T, kVector><<<dim3(ceil_div(job.N, kChunk), slices), kEmitThreads, 0, stream>>>(job);
    if (job.exact_budget) {
        assign_priorities<<<ceil_div(job.N, kThreads), kThreads, 0, stream>>>(job);
        apply_exact_budget<<<ceil_div(job.N, kWarps), kThreads, 0, stream>>>(job);
    }
    list_kept<<<1, kCompactThreads, 0, stream>>>(job);
    emit<T, kVector><<<dim3(job.capacity, slices), kEmitThreads, 0, stream>>>(job);
}

}  // namespace

cudaError_t merge(const Job& job, cudaStream_t stream) {
    gather_members<<<job.capacity, kThreads, 0, stream>>>(job);
    if (job.half_features) {
        if (job.D % 8 == 0)
            write_tokens<__half, 8>(job, stream);
        else
            write_tokens<__half, 2>(job, stream);
    } else {
        if (job.D % 4 == 0)
            write_tokens<float, 4>(job, stream);
        else
            write_tokens<float, 2>(job, stream);
    }
    return cudaGetLastError();
}

}  // namespace tango
