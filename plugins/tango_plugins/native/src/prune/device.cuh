// Small things that several kernels use.
#pragma once

#include "job.cuh"
#include "warp.cuh"

namespace tango {

// Sum of the values of the block's threads before this one; `total` is that of all. Every thread must call it.
__device__ inline int block_exclusive_sum(int value, int& total) {
    __shared__ int warp_totals[kWarp];
    int inclusive = value;
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const int before = __shfl_up_sync(kAllLanes, inclusive, offset);
        if (lane_id() >= offset) inclusive += before;
    }
    __syncthreads();  // an earlier call may still be read
    if (lane_id() == kWarp - 1) warp_totals[warp_id()] = inclusive;
    __syncthreads();
    int before_warp = 0;
    total = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
        if (warp == warp_id()) before_warp = total;
        total += warp_totals[warp];
    }
    return before_warp + inclusive - value;
}

// Squared distance of two rows from their inner products; 0 on the diagonal whatever rounding did.
__device__ inline float squared_distance(float norm_a, float norm_b, float product) {
    return fmaxf(__fsub_rn(__fadd_rn(norm_a, norm_b), 2.0f * product), 0.0f);
}

// A nearest candidate so far: smaller distance wins, then the lower index.
struct Nearest {
    float distance;
    int index;

    __device__ void offer(float other_distance, int other_index) {
        if (other_distance < distance || (other_distance == distance && other_index < index)) {
            distance = other_distance;
            index = other_index;
        }
    }
};

__device__ inline Nearest warp_nearest(Nearest mine) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        mine.offer(__shfl_xor_sync(kAllLanes, mine.distance, offset), __shfl_xor_sync(kAllLanes, mine.index, offset));
    return mine;
}

// The k-th smallest of one value of each lane, 1 <= k <= 32: a bitonic sort.
__device__ inline float warp_kth(float value, int k) {
    for (int size = 2; size <= kWarp; size *= 2)
        for (int stride = size / 2; stride > 0; stride /= 2) {
            const float other = __shfl_xor_sync(kAllLanes, value, stride);
            const bool ascending = (lane_id() & size) == 0, low = (lane_id() & stride) == 0;
            value = ascending == low ? fminf(value, other) : fmaxf(value, other);
        }
    return __shfl_sync(kAllLanes, value, k - 1);
}

// The k smallest of the values that a warp is shown, spread over its lanes in ascending order. k <= 32 * kRegisters.
template <int kRegisters>
struct Smallest {
    float value[kRegisters];
    float limit;  // values of the k smallest are below it: at most the k-th smallest so far
    int k;

    __device__ explicit Smallest(int count) : limit(INFINITY), k(count) {
#pragma unroll
        for (int r = 0; r < kRegisters; ++r) value[r] = INFINITY;
    }

    // Tells that no value above this one is among the k smallest.
    __device__ void expect(float most) { limit = fminf(limit, nextafterf(most, INFINITY)); }

    // Each lane shows one value; INFINITY is no value.
    __device__ void show(float shown) {
        unsigned better = __ballot_sync(kAllLanes, shown < limit);
        while (better) {
            const float next = __shfl_sync(kAllLanes, shown, __ffs(better) - 1);
            better &= better - 1;
            if (next < limit) insert(next);
        }
    }

    // The same in every lane.
    __device__ float sum() const {
        float total = 0.0f;
        for (int r = 0; r < kRegisters; ++r) total += r * kWarp + lane_id() < k ? value[r] : 0.0f;
        return warp_sum(total);
    }

  private:
    __device__ void insert(float next) {
        for (int r = 0; r < kRegisters; ++r) {
            const unsigned not_above = __ballot_sync(kAllLanes, value[r] <= next);
            if (not_above == kAllLanes) continue;
            const int place = __popc(not_above);
            const float last = __shfl_sync(kAllLanes, value[r], kWarp - 1);
            const float below = __shfl_up_sync(kAllLanes, value[r], 1);
            if (lane_id() == place) value[r] = next;
            if (lane_id() > place) value[r] = below;
            next = last;
        }
        for (int r = 0; r < kRegisters; ++r) {
            const float kth = __shfl_sync(kAllLanes, value[r], (k - 1) % kWarp);
            if (r == (k - 1) / kWarp) limit = fminf(limit, kth);
        }
    }
};

// Is this position static throughout the segment?
__device__ inline bool is_static(const Job& job, const Segment& segment, int position) {
    const int steps = segment.last - segment.first - 1;
    return steps > 0 && job.static_run[(segment.last - 1) * job.L + position] >= steps;
}

// Where the candidates of a select pool begin: a segment's static part shares its first frame's room.
__device__ inline int candidate_base(const Job& job, int pool) {
    if (pool < job.F) return pool * job.L;
    const Segment& segment = job.segment[pool - job.F];
    return segment.first * job.L + job.L - segment.static_positions;
}

}  // namespace tango
