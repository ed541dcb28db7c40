// Between select and merge: lists the remaining tokens pool by pool, and the tiles of their Gram matrices.
#include "primitives.cuh"

namespace tango {
namespace {

constexpr int kThreads = 512;
static_assert(kThreads >= 2 * TANGO_MAX_FRAMES, "one thread per pool");

// begin[p]: number of context entries before those of select pool p. A segment's frames are contiguous.
__device__ MergePool merge_pool(const Job& job, int pool, const int* begin) {
    const bool static_pool = pool >= job.F;
    const int s = static_pool ? pool - job.F : pool;
    MergePool found = {0, 0, 0, 1};
    if (s >= *job.segment_count) return found;
    const Segment segment = job.segment[s];
    const int from = static_pool ? pool : segment.first, to = static_pool ? pool + 1 : segment.last;
    found.first = begin[from];
    found.count = begin[to] - begin[from];
    found.anchors = static_pool ? segment.static_context : segment.context;
    found.frames = static_pool ? segment.last - segment.first : 1;
    found.aligned = 4 * (ceil_div(found.first, 4) + pool);
    return found;
}

__device__ bool has_work(const MergePool& pool) { return pool.anchors > 0 && pool.count > pool.anchors; }

// Block p lists the tokens that pool p did not select. Block 0 also describes the merge pools and their tiles.
__global__ void __launch_bounds__(kThreads) list_rest(Job job) {
    __shared__ int begin[kThreads + 1];
    const int pools = 2 * job.F, thread = threadIdx.x;
    int total;
    const int rest = thread < pools ? job.select_pool[thread].count - job.chosen[thread] : 0;
    begin[thread] = block_exclusive_sum(rest, total);
    if (thread == 0) begin[kThreads] = total;
    __syncthreads();

    const int pool = blockIdx.x;
    const bool static_pool = pool >= job.F;
    if (begin[pool + 1] > begin[pool]) {
        const int q = static_pool ? pool : job.frame_segment[pool];
        const MergePool merging = merge_pool(job, q, begin);
        const Segment segment = job.segment[static_pool ? pool - job.F : q];
        const int frame = static_pool ? segment.first : pool;
        int listed = begin[pool];
        for (int start = 0; start < job.L; start += kThreads) {
            const int l = start + thread, token = frame * job.L + l;
            const bool mine = l < job.L && is_static(job, segment, l) == static_pool && job.kind[token] != kSelected;
            const int entry = listed + block_exclusive_sum(mine, total);
            if (mine) {
                job.context[entry] = token;
                job.entry_pool[entry] = has_work(merging) ? q : -1;
                job.anchors[entry] = entry - merging.first;
                job.anchor_tokens[entry] = token;
                job.member_rows[entry] = 0;
                if (merging.count <= merging.anchors) job.kind[token] = kUnmerged;
            }
            listed += total;
        }
    }
    if (pool != 0) return;

    MergePool mine = {0, 0, 0, 1};
    if (thread < pools) mine = merge_pool(job, thread, begin);
    if (!has_work(mine)) mine.count = 0;
    int all_members;
    mine.member_row = block_exclusive_sum(mine.count * mine.frames, all_members);
    const int anchors = mine.count > 0 ? mine.anchors : 0;
    int all_anchors;
    mine.anchor_row = block_exclusive_sum(anchors, all_anchors);
    const int rows = ceil_div(mine.count, kTile);
    int all_rows;
    const int row = block_exclusive_sum(rows, all_rows);
    // In units; one pool that is too large is enough to know that they do not fit.
    const int room = job.gram_size / kRowUnit, row_units = ceil_div(mine.count, kRowUnit);
    const int units = min(static_cast<long long>(mine.count) * row_units, room + 1LL);
    int all_units;
    const int units_before = block_exclusive_sum(units, all_units);
    const bool packed = all_units <= room && all_rows <= kMaxPackedRows;
    mine.ld = packed ? row_units * kRowUnit : job.ld;
    mine.gram = packed ? units_before * kRowUnit : 0;
    if (thread < pools) {
        job.merge_pool[thread] = mine;
        job.max_sq_dist[thread] = 0.0f;
    }
    for (int i = 0; i < rows; ++i) job.tile_row[row + i] = {thread, i};
    if (thread == 0) {
        *job.context_count = begin[kThreads];
        *job.tile_rows = all_rows;
        *job.packed = packed;
        *job.member_count = all_members;
        *job.anchor_count = all_anchors;
    }
}

}  // namespace

cudaError_t list_context(const Job& job, cudaStream_t stream) {
    list_rest<<<2 * job.F, kThreads, 0, stream>>>(job);
    return cudaGetLastError();
}

}  // namespace tango
