// The threads of a decode block, and how they and the blocks of the grid wait for each other.
#pragma once

#include "common/platform.cuh"

namespace tango {

constexpr int kThreads = 512;  // that compute
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlock = kThreads + kWarp;  // and one more warp, which runs the grid barrier

// Synchronizes the computing threads of a block.
__device__ inline void sync_threads() { named_barrier_sync<1, kThreads>(); }

// Waits until at most so many of the thread's latest groups of copies are in flight, or fewer.
__device__ inline void copy_wait_for(int pending) {
    if (pending <= 0)
        copy_wait<0>();
    else if (pending == 1)
        copy_wait<1>();
    else if (pending == 2)
        copy_wait<2>();
    else if (pending == 3)
        copy_wait<3>();
    else if (pending == 4)
        copy_wait<4>();
    else if (pending == 5)
        copy_wait<5>();
    else
        copy_wait<6>();
}

// A barrier of the whole grid: all blocks arrive before one continues, and then see what the others wrote. The launch
// is cooperative, so all blocks are resident. Between arrive() and wait() a thread may do work that needs no other
// block, while the block's last warp waits for the others.
namespace grid_barrier {

__device__ inline void arrive() { named_barrier_arrive<2, kBlock>(); }

__device__ inline void wait() { named_barrier_sync<3, kBlock>(); }

}  // namespace grid_barrier

// What the last warp does, once per phase: waits for the block's own threads, adds the block to the grid's counter,
// waits until all blocks have done so, and releases the threads.
__device__ inline void grid_barrier_warp(unsigned* arrived_blocks, int phases) {
    for (unsigned target = gridDim.x; phases > 0; --phases, target += gridDim.x) {
        named_barrier_sync<2, kBlock>();
        if (lane_id() == 0) {
            add_one_release(arrived_blocks);
            while (load_acquire(arrived_blocks) < target) {
            }
        }
        __syncwarp();
        named_barrier_sync<3, kBlock>();
    }
}

}  // namespace tango
