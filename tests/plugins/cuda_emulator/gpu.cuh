// What kernels need of a GPU, on a CPU: one thread for each of the GPU's.
//
// Copies to shared memory arrive as late as they may: when their own thread waits for them. A thread that reads what it
// has not waited for finds NaN there. With TANGO_EARLY_COPIES they arrive at once: one that overwrites what others read
// still is a race that ThreadSanitizer sees.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <deque>
#include <thread>
#include <utility>
#include <vector>

struct Warp {
    std::barrier<> barrier{32};
    float values[32];
    const char* addresses[32];
    uint32_t left[32][4], right[32][2];
};

struct Block {
    std::barrier<> all;
    std::deque<Warp> warps;
    std::vector<float4> shared;
    Block(int threads, size_t bytes) : all(threads), warps(threads / 32), shared(bytes / sizeof(float4) + 1) {
        std::memset(shared.data(), 0xff, shared.size() * sizeof(float4));
    }
};

inline thread_local Block* block;
inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 gridDim;

using std::max;
using std::min;
#define __launch_bounds__(...)

inline Warp& warp() { return block->warps[threadIdx.x / 32]; }

inline float __shfl_xor_sync(unsigned, float value, int offset) {
    warp().values[threadIdx.x % 32] = value;
    warp().barrier.arrive_and_wait();
    value = warp().values[threadIdx.x % 32 ^ offset];
    warp().barrier.arrive_and_wait();
    return value;
}

inline void __syncwarp() { warp().barrier.arrive_and_wait(); }
inline void __syncthreads() { block->all.arrive_and_wait(); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }

#include "warp.cuh"

namespace tango {

struct Copy {
    char* to;
    const void* from;
};
inline thread_local std::vector<Copy> open_copies;
inline thread_local std::deque<std::vector<Copy>> groups;

using SharedAddress = char*;

template <typename T>
SharedAddress shared_address(T* pointer) {
    return reinterpret_cast<char*>(pointer);
}

inline void copy_async(SharedAddress to, const void* from) {
#ifdef TANGO_EARLY_COPIES
    std::memcpy(to, from, 16);
#else
    open_copies.push_back({to, from});
#endif
}

inline void copy_commit() { groups.push_back(std::exchange(open_copies, {})); }

template <int kPending>
void copy_wait() {
    for (; groups.size() > kPending; groups.pop_front())
        for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
}

inline float4* shared_memory() { return block->shared.data(); }

// Runs a kernel's blocks from one on, of so many that it has, all at once.
template <typename Argument>
void run(void (*kernel)(Argument), const Argument& argument, std::deque<Block>& blocks, int threads_of_block, int first,
         int of) {
    std::vector<std::thread> threads;
    for (int i = 0; i < static_cast<int>(blocks.size()) * threads_of_block; ++i)
        threads.emplace_back([&, i] {
            block = &blocks[i / threads_of_block], gridDim.x = of;
            threadIdx.x = i % threads_of_block, blockIdx.x = first + i / threads_of_block;
            kernel(argument);
        });
    for (std::thread& thread : threads) thread.join();
}

}  // namespace tango
