// The kernel of a decode step on a CPU: one thread for each of the GPU's. It stands in for src/decode/machine.cuh.
//
// Copies to shared memory arrive as late as they may: when their own thread waits for them. A thread that reads what it
// has not waited for finds NaN there.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
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
};

struct Block {
    std::barrier<> computing{512}, arrived{544}, released{544};
    Warp warps[17];
    std::vector<float4> shared;
    explicit Block(size_t bytes) : shared(bytes / sizeof(float4) + 1) {
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
inline void __threadfence() {}  // atomicAdd is one here
inline unsigned atomicAdd(unsigned* to, unsigned value) { return std::atomic_ref(*to).fetch_add(value); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

template <typename T>
T __ldcg(const T* from) {
    return *from;
}

template <typename T>
void __stcg(T* to, T value) {
    *to = value;
}

#include "warp.cuh"

namespace tango {

constexpr int kThreads = 512;
constexpr int kBlock = kThreads + kWarp;
constexpr int kWarps = kThreads / kWarp;

struct Copy {
    char* to;
    const void* from;
};
inline thread_local std::vector<Copy> open_copies;
inline thread_local std::deque<std::vector<Copy>> groups;

template <typename T>
char* shared_address(T* pointer) {
    return reinterpret_cast<char*>(pointer);
}

inline void copy_async(char* to, const void* from) { open_copies.push_back({to, from}); }

inline void copy_commit() { groups.push_back(std::exchange(open_copies, {})); }

template <int kPending>
void copy_wait() {
    for (; groups.size() > kPending; groups.pop_front())
        for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
}

inline void prefetch(const void*) {}
inline float4* shared_memory() { return block->shared.data(); }
inline void sync_threads() { block->computing.arrive_and_wait(); }

namespace barrier {

inline void arrive() { static_cast<void>(block->arrived.arrive()); }
inline void wait() { block->released.arrive_and_wait(); }
inline void gather() { block->arrived.arrive_and_wait(); }

inline unsigned load_acquire(unsigned* from) {
    std::this_thread::yield();
    return std::atomic_ref(*from).load();
}

}  // namespace barrier

template <typename Argument>
cudaError_t launch_together(void (*kernel)(Argument), Argument argument, int blocks, size_t shared, cudaStream_t) {
    std::deque<Block> all;
    std::vector<std::thread> threads;
    for (int b = 0; b < blocks; ++b) all.emplace_back(shared);
    for (int i = 0; i < blocks * kBlock; ++i)
        threads.emplace_back([&, i] {
            block = &all[i / kBlock], threadIdx.x = i % kBlock, blockIdx.x = i / kBlock, gridDim.x = blocks;
            kernel(argument);
        });
    for (std::thread& thread : threads) thread.join();
    return cudaSuccess;
}

}  // namespace tango
