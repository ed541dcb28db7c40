// What the kernel asks of the machine below C++, in one place: a test puts a CPU's threads there.
#pragma once

#include "copy.cuh"
#include "launch.cuh"
#include "warp.cuh"

namespace tango {

constexpr int kThreads = 512;             // that compute
constexpr int kBlock = kThreads + kWarp;  // and a warp that keeps the blocks in step
constexpr int kWarps = kThreads / kWarp;

// The threads that compute.
__device__ inline void sync_threads() { asm volatile("bar.sync 1, %0;\n" ::"n"(kThreads) : "memory"); }

// Has the memory bring a sector into the L2 cache; waits for nothing.
__device__ inline void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(from)); }

// All blocks reach it before one leaves it, and see then what the others wrote. They are all resident: the launch is
// cooperative. Between its halves a thread may do what needs no other block, while the last warp waits.
namespace barrier {

__device__ inline void arrive() { asm volatile("bar.arrive 2, %0;\n" ::"n"(kBlock) : "memory"); }

__device__ inline void wait() { asm volatile("bar.sync 3, %0;\n" ::"n"(kBlock) : "memory"); }

// For the last warp: until all threads that compute have arrived.
__device__ inline void gather() { asm volatile("bar.sync 2, %0;\n" ::"n"(kBlock) : "memory"); }

__device__ inline unsigned load_acquire(const unsigned* from) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(value) : "l"(from) : "memory");
    return value;
}

}  // namespace barrier

// Launches a kernel whose blocks wait for one another.
template <typename Argument>
cudaError_t launch_together(void (*kernel)(Argument), Argument argument, int blocks, size_t shared, cudaStream_t stream) {
    const void* function = reinterpret_cast<const void*>(kernel);
    const cudaError_t error = allow_shared(function, shared);
    if (error != cudaSuccess) return error;
    void* arguments[] = {&argument};
    return cudaLaunchCooperativeKernel(function, dim3(blocks), dim3(kBlock), arguments, shared, stream);
}

}  // namespace tango
