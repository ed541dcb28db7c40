// Step 3: segments, and the budgets of step 4. One block, because the work is small and sequential.
#include "primitives.cuh"

namespace tango {
namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 16;
constexpr int kNearFrames = 96;  // the table of a video of up to so many frames is in shared memory

// Follows position l through the frames, and counts for how many it has been unchanged, and static. `table` [F, F]
// counts the positions by the length of their unchanged run up to each frame.
__device__ void count_runs(const Job& job, int l, int* table) {
    int unchanged = 0, static_run = 0;
    job.static_run[l] = 0;
    for (int start = 0; start < job.F - 1; start += kUnroll) {
        float cosine[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            cosine[i] = start + i < job.F - 1 ? job.cosines[(start + i) * job.L + l] : 0.0f;
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int frame = start + i + 1;
            if (frame >= job.F) break;
            unchanged = cosine[i] > job.segment_threshold ? unchanged + 1 : 0;
            static_run = cosine[i] > job.static_threshold ? static_run + 1 : 0;
            job.static_run[frame * job.L + l] = static_cast<uint16_t>(static_run);
            atomicAdd(&table[frame * job.F + unchanged], 1);
        }
    }
}

// Turns the count of positions with a run of q frames into that of positions with a run of at least q frames.
__device__ void accumulate_runs(const Job& job, int* table) {
    for (int frame = 1 + warp_id(); frame < job.F; frame += kThreads / kWarp) {
        int* row = table + frame * job.F;
        int above = 0;
        for (int start = frame / kWarp * kWarp; start >= 0; start -= kWarp) {
            const int q = start + lane_id();
            int count = q <= frame ? row[q] : 0;
            for (int offset = 1; offset < kWarp; offset *= 2) {
                const int later = __shfl_down_sync(kAllLanes, count, offset);
                if (lane_id() + offset < kWarp) count += later;
            }
            count += above;
            if (q <= frame) row[q] = count;
            above = __shfl_sync(kAllLanes, count, 0);
        }
    }
}

__device__ int warp_max_int(int value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(kAllLanes, value);
#else
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value = max(value, __shfl_xor_sync(kAllLanes, value, offset));
    return value;
#endif
}

// best[e]: the largest gain of the first e frames. length[e]: the length of the last segment of that partition. One
// warp.
__device__ void best_partition(const Job& job, const int* table, int* best, int* length) {
    constexpr int kWindows = TANGO_MAX_FRAMES / kWarp;
    constexpr int kWindowScale = 1024;  // above any window; gains stay below F L = 2^18
    if (lane_id() == 0) best[0] = 0;
    __syncwarp();
    int unchanged[kWindows], ahead[kWindows];  // positions unchanged over w frames; those of the next end
    auto fetch = [&](int end, int* row) {
#pragma unroll
        for (int i = 0; i < kWindows; ++i) {
            if (i * kWarp >= end) break;
            const int steps = i * kWarp + lane_id();
            row[i] = end <= job.F && steps > 0 && steps < end ? table[(end - 1) * job.F + steps] : 0;
        }
    };
    fetch(1, ahead);
    for (int end = 1; end <= job.F; ++end) {
#pragma unroll
        for (int i = 0; i < kWindows; ++i) unchanged[i] = ahead[i];
        fetch(end + 1, ahead);
        int top = 0;  // the largest total, and in its low digits how short the last segment is
#pragma unroll
        for (int i = 0; i < kWindows; ++i) {
            if (i * kWarp >= end) break;
            const int steps = i * kWarp + lane_id();
            if (steps < end)
                top =
                    max(top, (best[end - 1 - steps] + unchanged[i] * steps) * kWindowScale + kWindowScale - 1 - steps);
        }
        top = warp_max_int(top);
        if (lane_id() == 0) {
            best[end] = top / kWindowScale;
            length[end] = kWindowScale - top % kWindowScale;
        }
        __syncwarp();
    }
}

struct Split {
    int salient, context;
};

// fp64, in the order of operations of docs/reference/operator.md.
__device__ Split split_budget(const Job& job, int m) {
    const int salient = static_cast<int>(floor(m * (1.0 - job.context_ratio)));
    return {salient, m - salient};
}

__device__ Split compress_budget(const Job& job, int count, double ratio) {
    return split_budget(job, count == 0 ? 0 : max(1, static_cast<int>(ceil(count * ratio))));
}

__device__ SelectPool select_pool(const Job& job, int count, int salient) {
    return {count, salient, min(static_cast<int>(floor(job.expansion * salient)), count)};
}

// Budgets of a segment; called by one lane.
__device__ void plan_segment(const Job& job, int s, int first, int last, int static_positions) {
    const int n = last - first;
    Segment segment = {first, last, static_positions, 0, 0};
    if (n == 1) {
        const Split split = compress_budget(job, job.L, job.retention);
        segment.context = split.context;
        job.select_pool[first] = select_pool(job, job.L, split.salient);
        job.select_pool[job.F + s] = {0, 0, 0};
    } else {
        const int T = n * job.L, g = (n - 1) * static_positions, dynamic = job.L - static_positions;
        const double share = static_cast<double>(T - g) / T;
        const double ratio = fmin(1.0, job.retention / share);
        const Split static_split = compress_budget(job, static_positions, ratio);
        segment.static_context = static_split.context;
        job.select_pool[job.F + s] = select_pool(job, static_positions, static_split.salient);
        const Split dynamic_split = split_budget(job, static_cast<int>(ceil(dynamic * ratio)));
        segment.context = dynamic_split.context * n;
        for (int f = first; f < last; ++f) job.select_pool[f] = select_pool(job, dynamic, dynamic_split.salient);
    }
    job.segment[s] = segment;
    for (int f = first; f < last; ++f) job.frame_segment[f] = s;
}

__global__ void __launch_bounds__(kThreads) partition(Job job) {
    __shared__ int best[TANGO_MAX_FRAMES + 1], length[TANGO_MAX_FRAMES + 1], bounds[TANGO_MAX_FRAMES + 1];
    __shared__ int segments, near[kNearFrames * kNearFrames];
    int* table = job.F <= kNearFrames ? near : job.unchanged;
    for (int i = threadIdx.x; i < job.F * job.F; i += kThreads) table[i] = 0;
    __syncthreads();
    for (int l = threadIdx.x; l < job.L; l += kThreads) count_runs(job, l, table);
    __syncthreads();
    accumulate_runs(job, table);
    __syncthreads();
    if (warp_id() == 0) best_partition(job, table, best, length);
    __syncthreads();
    if (threadIdx.x == 0) {
        segments = 0;
        for (int end = job.F; end > 0; end -= length[end]) ++segments;
        int place = segments;
        for (int end = job.F; end > 0; end -= length[end]) bounds[place--] = end;
        bounds[0] = 0;
        *job.segment_count = segments;
    }
    __syncthreads();
    for (int s = warp_id(); s < job.F; s += kThreads / kWarp) {
        const bool real = s < segments;
        if (lane_id() == 0 && job.segments != nullptr) {
            job.segments[2 * s] = real ? bounds[s] : -1;
            job.segments[2 * s + 1] = real ? bounds[s + 1] : -1;
        }
        if (!real) {
            if (lane_id() == 0) job.select_pool[job.F + s] = {0, 0, 0};
            continue;
        }
        const int first = bounds[s], last = bounds[s + 1];
        int static_positions = 0;
        if (last - first > 1)
#pragma unroll 8
            for (int l = lane_id(); l < job.L; l += kWarp)
                static_positions += job.static_run[(last - 1) * job.L + l] >= last - first - 1;
        static_positions = warp_sum(static_positions);
        if (lane_id() == 0) plan_segment(job, s, first, last, static_positions);
    }
}

}  // namespace

cudaError_t find_segments(const Job& job, cudaStream_t stream) {
    partition<<<1, kThreads, 0, stream>>>(job);
    return cudaGetLastError();
}

}  // namespace tango
