// What keeps a decode step within the registers of a thread. Its phases are one loop, and around a loop the compiler
// keeps more than fits.
#pragma once

#include "common/platform.cuh"

namespace tango {

// Whether a step whose matrices are all blocks of 4 bits keeps its place in them between its first loads and its
// products. Elsewhere, where it would spill, it finds its place again, as steps of any formats do.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
constexpr bool kKeepsPlace = true;
#else
constexpr bool kKeepsPlace = false;
#endif

// The same value, of which the compiler knows nothing: what is computed from it stays where it is, instead of being
// kept in registers, or out of them, from before a loop.
__device__ inline int opaque(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// The lane, where a loop over tiles begins in a step of one sequence: what is computed from it is not kept in registers
// while other phases run. sm_90 spills little in any case, and is faster as it is.
__device__ inline int local_lane() {
#if __CUDA_ARCH__ == 900
    return lane_id();
#else
    return opaque(lane_id());
#endif
}

// Gives values to variables that a thread may load or not. One that may have none keeps its registers in all loops
// around it. In the code that nvcc 13 makes for sm_100 and later these were 64 of a thread's 96 registers.
template <typename T, int kCount>
__device__ void clear(T (&variables)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) variables[i] = T{};
}

}  // namespace tango
