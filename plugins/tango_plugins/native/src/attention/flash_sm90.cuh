// FlashAttention-3 (arXiv 2407.08608) on Hopper's warpgroups: what the kernels of vision_sm90.cu and prefill_sm90.cu
// share. One warpgroup of a block copies, the others multiply; they pass buffers in shared memory to each other.
//
// In shared memory a tile is stored by columns of eight dimensions: those of a row are a pitch apart, rows are 16 bytes
// apart. Any number of dimensions that is a multiple of eight fits.
#pragma once

#include "attention/flash.cuh"
#ifndef TANGO_PLATFORM_HEADER
#include "common/mbarrier.cuh"
#include "common/wgmma.cuh"
#endif

namespace tango {

constexpr int kGroupThreads = 128, kGroupWarps = kGroupThreads / kWarp;  // of a warpgroup
constexpr int kHopperSharedBytes = 227 << 10;                            // that a block can have
constexpr int kBarrierBytes = 16;                                        // of the two barriers of a buffer

// Buffers of one kind that the producer fills and the consumers empty in the same order. Each has two barriers.
template <int kBuffers, int kBytes>
class Ring {
  public:
    __device__ Ring(SharedAddress buffers, SharedAddress barriers) : buffers_(buffers), barriers_(barriers) {}

    __device__ void init(int consumers) const {
        for (int i = 0; i < kBuffers; ++i) {
            mbarrier_init(barriers_ + kBarrierBytes * i, kGroupWarps);
            mbarrier_init(barriers_ + kBarrierBytes * i + 8, consumers * kGroupWarps);
        }
    }

    __device__ SharedAddress buffer() const { return buffers_ + index_ * kBytes; }
    __device__ SharedAddress filled() const { return barriers_ + kBarrierBytes * index_; }
    __device__ SharedAddress emptied() const { return filled() + 8; }
    __device__ void wait_filled() const { mbarrier_wait(filled(), phase_); }
    __device__ void wait_emptied() const { mbarrier_wait(emptied(), phase_ ^ 1); }

    __device__ void advance() {
        if (++index_ < kBuffers) return;
        index_ = 0;
        phase_ ^= 1;
    }

  private:
    SharedAddress buffers_, barriers_;
    int index_ = 0, phase_ = 0;
};

// Arrives for all threads of a warp, after what each of them did before.
__device__ inline void arrive_warp(SharedAddress barrier) {
    __syncwarp();
    if (lane_id() == 0) mbarrier_arrive(barrier);
}

// A producer's copies. They arrive in order; kAhead of them are under way when the next one starts.
class Copies {
  public:
    // Ends a copy, and waits for the one that was started kAhead copies before: its barrier is arrived at.
    __device__ void finish(SharedAddress filled) {
        copy_commit();
        copy_wait<kAhead>();
        wgmma_publish();
        if (pending_[0] != 0) arrive_warp(pending_[0]);
#pragma unroll
        for (int i = 0; i + 1 < kAhead; ++i) pending_[i] = pending_[i + 1];
        pending_[kAhead - 1] = filled;
    }

    // Waits for all of them.
    __device__ void drain() {
        for (int i = 0; i < kAhead; ++i) finish(0);
    }

  private:
    static constexpr int kAhead = 2;

    SharedAddress pending_[kAhead] = {};
};

}  // namespace tango
