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

// The same at a barrier whose number is not known to the compiler, but is the same for all threads of a warp.
template <int kThreads>
__device__ inline void named_barrier_sync(int id) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(id), "n"(kThreads) : "memory");
}

template <int kThreads>
__device__ inline void named_barrier_arrive(int id) {
    asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "n"(kThreads) : "memory");
}

__device__ inline unsigned load_acquire(const unsigned* from) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(value) : "l"(from) : "memory");
    return value;
}

// Of memory that the host writes while the kernel runs.
__device__ inline unsigned load_acquire_system(const unsigned* from) {
    unsigned value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];\n" : "=r"(value) : "l"(from) : "memory");
    return value;
}

// Adds one to a counter. Who reads the sum with load_acquire() sees what this thread has written or seen before.
__device__ inline void add_one_release(unsigned* to) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;\n" ::"l"(to) : "memory");
}

// Adds one to a counter and returns what it was. What this thread has written or seen before is seen by whoever adds
// later, and the reverse.
__device__ inline unsigned add_one_acq_rel(unsigned* to) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;\n" : "=r"(before) : "l"(to) : "memory");
    return before;
}

// Brings the sector at an address into the L2 cache, without waiting.
__device__ inline void prefetch_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(from)); }

}  // namespace tango
