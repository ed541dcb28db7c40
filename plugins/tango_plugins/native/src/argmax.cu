// The greatest of a row of logits. One block: 150,000 of them are 0.6 MB, the weights that a token reads are hundreds.
#include "warp.cuh"
#include "tango/argmax.h"

namespace tango {
namespace {

constexpr int kThreads = 1024;

// Orders pairs as integers: the greater value first, then the lower index. NaN is above everything.
__device__ unsigned long long rank_of(float value, int index) {
    const unsigned bits = __float_as_uint(value + 0.0f);  // -0 is equal to 0
    const unsigned ordered = isnan(value) ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - static_cast<unsigned>(index));
}

__device__ unsigned long long warp_greatest(unsigned long long rank) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const unsigned long long other = __shfl_xor_sync(kAllLanes, rank, offset);
        rank = other > rank ? other : rank;
    }
    return rank;
}

__global__ void __launch_bounds__(kThreads) find_greatest(const float* values, int size, TangoGreatest* greatest) {
    __shared__ unsigned long long of_warp[kThreads / kWarp];
    unsigned long long best = 0;  // below the rank of every value
#pragma unroll 8
    for (int i = threadIdx.x; i < size; i += kThreads) {
        const unsigned long long rank = rank_of(values[i], i);
        best = rank > best ? rank : best;
    }
    best = warp_greatest(best);
    if (lane_id() == 0) of_warp[warp_id()] = best;
    __syncthreads();
    if (warp_id() != 0) return;
    best = warp_greatest(of_warp[lane_id()]);
    if (lane_id() != 0) return;
    const int index = static_cast<int>(0xffffffffu - static_cast<unsigned>(best));
    *greatest = {index, values[index]};
}

}  // namespace
}  // namespace tango

int tango_argmax_enqueue(const float* values, int32_t size, TangoGreatest* greatest, void* stream) {
    if (values == nullptr || greatest == nullptr || size < 1) return cudaErrorInvalidValue;
    tango::find_greatest<<<1, tango::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(values, size, greatest);
    return cudaGetLastError();
}
