// The threads of a block of a batched decode step, and how they and the blocks of the grid wait for each other. They
// are half of those of a step of one sequence: a thread needs twice the registers, and what does not fit into them
// would go through an L1 cache that shared memory leaves little of.
#pragma once

#include "grid_barrier.cuh"

namespace tango {

constexpr int kBatchThreads = 256;  // that compute
constexpr int kBatchWarps = kBatchThreads / kWarp;
constexpr int kBatchBlock = kBatchThreads + kWarp;  // and one more warp, which runs the barrier of the grid

// Synchronizes the computing threads of a block.
__device__ inline void sync_batch() { named_barrier_sync<1, kBatchThreads>(); }

using BatchBarrier = GridBarrier<kBatchBlock>;

}  // namespace tango
