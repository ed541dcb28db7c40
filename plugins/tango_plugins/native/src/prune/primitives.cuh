// Device functions that several steps use.
#pragma once

#include "common/platform.cuh"
#include "job.cuh"

namespace tango {

// Sum of the values of the block's threads before this one; `total` is the sum of all. Every thread must call it.
__device__ inline int block_exclusive_sum(int value, int& total) {
    __shared__ int warp_totals[kWarp];
    int inclusive = value;
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const int before = __shfl_up_sync(kAllLanes, inclusive, offset);
        if (lane_id() >= offset) inclusive += before;
    }
    __syncthreads();  // an earlier call's totals may still be in use
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

// Squared distance of two rows from their inner products; exactly 0 on the diagonal.
__device__ inline float squared_distance(float norm_a, float norm_b, float product) {
    return fmaxf(__fsub_rn(__fadd_rn(norm_a, norm_b), 2.0f * product), 0.0f);
}

// The nearest candidate so far; the lower index wins ties.
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

// The k-th smallest of the lanes' values, 1 <= k <= 32, by a bitonic sort.
__device__ inline float warp_kth(float value, int k) {
    for (int size = 2; size <= kWarp; size *= 2)
        for (int stride = size / 2; stride > 0; stride /= 2) {
            const float other = __shfl_xor_sync(kAllLanes, value, stride);
            const bool ascending = (lane_id() & size) == 0, low = (lane_id() & stride) == 0;
            value = ascending == low ? fminf(value, other) : fmaxf(value, other);
        }
    return __shfl_sync(kAllLanes, value, k - 1);
}

// The k smallest values offered to a warp, in ascending order over its lanes; k <= 32 * kRegisters.
template <int kRegisters>
struct KSmallest {
    float value[kRegisters];
    float limit;  // only values below it can be among the k smallest
    int k;

    __device__ explicit KSmallest(int count) : limit(INFINITY), k(count) {
#pragma unroll
        for (int r = 0; r < kRegisters; ++r) value[r] = INFINITY;
    }

    // States that no value above `bound` is among the k smallest.
    __device__ void set_bound(float bound) { limit = fminf(limit, nextafterf(bound, INFINITY)); }

    // Each lane offers one value; INFINITY is no value.
    __device__ void offer(float offered) {
        unsigned better = __ballot_sync(kAllLanes, offered < limit);
        while (better) {
            const float next = __shfl_sync(kAllLanes, offered, __ffs(better) - 1);
            better &= better - 1;
            if (next < limit) insert(next);
        }
    }

    // Sum of the k values, in every lane.
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
            const int rank = __popc(not_above);
            const float last = __shfl_sync(kAllLanes, value[r], kWarp - 1);
            const float below = __shfl_up_sync(kAllLanes, value[r], 1);
            if (lane_id() == rank) value[r] = next;
            if (lane_id() > rank) value[r] = below;
            next = last;
        }
        for (int r = 0; r < kRegisters; ++r) {
            const float kth = __shfl_sync(kAllLanes, value[r], (k - 1) % kWarp);
            if (r == (k - 1) / kWarp) limit = fminf(limit, kth);
        }
    }
};

// Whether a position is static throughout a segment.
__device__ inline bool is_static(const Job& job, const Segment& segment, int position) {
    const int steps = segment.last - segment.first - 1;
    return steps > 0 && job.static_run[(segment.last - 1) * job.L + position] >= steps;
}

// Index of the first candidate of a select pool. A segment's static part shares the range of its first frame.
__device__ inline int candidate_base(const Job& job, int pool) {
    if (pool < job.F) return pool * job.L;
    const Segment& segment = job.segment[pool - job.F];
    return segment.first * job.L + job.L - segment.static_positions;
}

}  // namespace tango
