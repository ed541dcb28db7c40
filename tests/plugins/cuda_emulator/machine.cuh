// src/decode/machine.cuh on a CPU's threads.
#pragma once

#include "gpu.cuh"

#include <atomic>

inline unsigned atomicAdd(unsigned* to, unsigned value) { return std::atomic_ref(*to).fetch_add(value); }
inline void __threadfence() {}  // atomicAdd is one here

template <typename T>
T __ldcg(const T* from) {
    return *from;
}

template <typename T>
void __stcg(T* to, T value) {
    *to = value;
}

namespace tango {

constexpr int kThreads = 512;
constexpr int kBlock = kThreads + kWarp;
constexpr int kWarps = kThreads / kWarp;

// Of a block: the threads that compute, and all on their way into and out of the barrier of all blocks.
struct Meeting {
    std::barrier<> computing{kThreads}, arrived{kBlock}, released{kBlock};
};
inline std::deque<Meeting>* meetings;
inline Meeting& meeting() { return (*meetings)[blockIdx.x]; }

inline void prefetch(const void*) {}
inline void sync_threads() { meeting().computing.arrive_and_wait(); }

namespace barrier {

inline void arrive() { static_cast<void>(meeting().arrived.arrive()); }
inline void wait() { meeting().released.arrive_and_wait(); }
inline void gather() { meeting().arrived.arrive_and_wait(); }

inline unsigned load_acquire(unsigned* from) {
    std::this_thread::yield();
    return std::atomic_ref(*from).load();
}

}  // namespace barrier

template <typename Argument>
cudaError_t launch_together(void (*kernel)(Argument), Argument argument, int blocks, size_t shared, cudaStream_t) {
    std::deque<Block> all;
    std::deque<Meeting> of_blocks(blocks);
    for (int b = 0; b < blocks; ++b) all.emplace_back(kBlock, shared);
    meetings = &of_blocks;
    run(kernel, argument, all, kBlock, 0, blocks);
    return cudaSuccess;
}

}  // namespace tango
