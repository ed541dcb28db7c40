// The threads of a decode block, and how they and the blocks of the grid wait for each other.
#pragma once

#include "grid_barrier.cuh"

namespace tango {

constexpr int kThreads = 512;  // that compute
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlock = kThreads + kWarp;  // and one more warp, which runs the grid barrier

// Synchronizes the computing threads of a block.
__device__ inline void sync_threads() { named_barrier_sync<1, kThreads>(); }

using DecodeBarrier = GridBarrier<kBlock>;

}  // namespace tango
