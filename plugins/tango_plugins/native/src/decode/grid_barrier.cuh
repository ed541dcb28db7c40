// How the blocks of a decode step wait for each other.
#pragma once

#include "common/platform.cuh"

namespace tango {

// A barrier of the whole grid: all blocks arrive before one continues, and then see what the others wrote. The launch
// is cooperative, so all blocks are resident. A block has kBlock threads, the last warp of which runs the barrier.
// Between arrive() and wait() any other thread may do work that needs no other block.
template <int kBlock>
struct GridBarrier {
    __device__ static void arrive() { named_barrier_arrive<2, kBlock>(); }

    __device__ static void wait() { named_barrier_sync<3, kBlock>(); }

    // What the last warp does, once per phase: waits for the block's own threads, adds the block to the grid's counter,
    // waits until all blocks have done so, and releases the threads.
    __device__ static void run(unsigned* arrived_blocks, int phases) {
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
};

}  // namespace tango
