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

// The operands of a warpgroup with 64 query rows, in registers: its products with keys and with values. Of the 64 rows
// a warp has 16, and a thread two: its lane / 4, and that + 8. T is a kernel's tile, kOutputs what a thread has of the
// output.
template <typename T, int kOutputs>
class Products {
  public:
    __device__ Products(int first_row) : first_row_(first_row) {}

  protected:
    static constexpr int kWidthSteps = T::kWidth / 16, kWeightSteps = T::kKeys / 16;

    // The first of a warp's rows in a buffer of queries.
    __device__ SharedAddress warp_rows(SharedAddress queries) const { return queries + first_row_ * 16; }

    __device__ void load_queries(SharedAddress queries) {
        const SharedAddress row = warp_rows(queries) + lane_id() % 16 * 16;
#pragma unroll
        for (int k = 0; k < kWidthSteps; ++k)
            load_matrices(queries_[k], row + (2 * k + lane_id() / 16) * T::kQueryPitch);
    }

    __device__ void multiply_keys(SharedAddress keys) {
#pragma unroll
        for (int k = 0; k < kWidthSteps; ++k)
            wgmma(scores_, queries_[k], wgmma_rows<T::kPitch>(keys + 2 * k * T::kPitch), k);
    }

    __device__ void multiply_values(SharedAddress values) {
#pragma unroll
        for (int k = 0; k < kWeightSteps; ++k)
            wgmma(attn_out_, weights_[k], wgmma_columns<T::kPitch>(values + 16 * k * 16));
    }

    // Waits for the products that were committed.
    __device__ void wait_products() {
        wgmma_wait<0>();
        wgmma_hold(scores_);
        wgmma_hold(attn_out_);
        wgmma_hold(weights_);
        wgmma_hold(queries_);
    }

    const int first_row_;  // of the warp
    uint32_t queries_[kWidthSteps][4], weights_[kWeightSteps][4];
    float scores_[T::kKeys / 2], attn_out_[kOutputs];  // of a thread
};

}  // namespace tango
