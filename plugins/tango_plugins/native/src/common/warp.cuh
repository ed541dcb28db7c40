// Indices of a thread in its warp, and reductions over a warp.
#pragma once

namespace tango {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ inline int lane_id() { return threadIdx.x % kWarp; }
__device__ inline int warp_id() { return threadIdx.x / kWarp; }

template <typename T>
__device__ T warp_sum(T value) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
    return value;
}

__device__ inline float warp_min(float value) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        value = fminf(value, __shfl_xor_sync(kAllLanes, value, offset));
    return value;
}

__device__ inline float warp_max(float value) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
    return value;
}

}  // namespace tango
