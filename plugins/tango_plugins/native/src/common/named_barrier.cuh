// Barriers that only some threads of a block take part in, and the memory operations of a barrier of the whole grid.
#pragma once

namespace tango {

// Waits until kThreads threads of the block have arrived at barrier kId, from 1 to 15. Barrier 0 is __syncthreads().
template <int kId, int kThreads>
__device__ inline void named_barrier_sync() {
    asm volatile("bar.sync %0, %1;\n" ::"n"(kId), "n"(kThreads) : "memory");
}

// Arrives at a barrier that other threads wait at, and does not wait.
template <int kId, int kThreads>
__device__ inline void named_barrier_arrive() {
    asm volatile("bar.arrive %0, %1;\n" ::"n"(kId), "n"(kThreads) : "memory");
}

__device__ inline unsigned load_acquire(const unsigned* from) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(value) : "l"(from) : "memory");
    return value;
}

// Brings the sector at an address into the L2 cache, without waiting.
__device__ inline void prefetch_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(from)); }

}  // namespace tango
