// Products of one vector with fp16 matrices [rows, columns] (GEMV), distributed over all blocks of a grid. Each weight
// is read once and used once, so all that matters is to keep memory reads in flight.
#pragma once

#include "threads.cuh"

namespace tango {

constexpr int kVector = 8;        // fp16 elements of one load
constexpr int kSector = 16;       // columns of the smallest memory access: 32 bytes
constexpr int kLoads = 4;         // loads that a thread keeps in flight: 32 KB per SM
constexpr int kMaxVectors = 256;  // of a row of a tile, so that a block reads at least two rows at a time
constexpr int kAccumulatorFloats = kThreads * kVector;  // shared memory that a GEMV needs for its accumulators

// How a GEMV is distributed. The columns are cut into tiles. Where these are too few to keep all blocks busy, the rows
// are cut as well (split-K), and whoever reads the result adds the partial results. One thread reads one vector of a
// row of a tile, over all matrices, so a block reads `rows_per_iter` rows at a time.
struct GemvPartition {
    int matrices;             // one, or two that share their input
    int rows, columns;        // of a matrix
    int tile_n, tiles;        // columns of a tile; number of tiles
    int split_rows, split_k;  // rows of a split; number of splits
    int vectors_per_row;      // of a tile, over all matrices
    int rows_per_iter;
};

__device__ inline void multiply_add(float (&acc)[kVector], const uint4& vector, float factor) {
    const __half2* pairs = reinterpret_cast<const __half2*>(&vector);
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
        const float2 pair = __half22float2(pairs[i]);
        acc[2 * i] += pair.x * factor;
        acc[2 * i + 1] += pair.y * factor;
    }
}

// A block's part of a GEMV with one matrix or two: some pairs of a tile and a split.
//
// The loads of a thread go through its own ring in shared memory, which needs neither registers nor barriers. The first
// loads start in the constructor, because weights depend on no other block. So they are in flight while the block waits
// for the blocks that compute its input.
class Gemv {
  public:
    __device__ Gemv(const GemvPartition& partition, uint4* ring, const void* first, const void* second)
        : partition_(partition),
          ring_(ring + threadIdx.x),
          first_(static_cast<const __half*>(first)),
          second_(static_cast<const __half*>(second)),
          index_(blockIdx.x) {
        start();
    }

    // First row and number of rows of the input that the block needs: those of its split.
    __device__ int row() const { return row_; }
    __device__ int rows() const { return rows_; }

    // Computes the block's part. `input` is in shared memory and begins with row(); `acc` is kAccumulatorFloats of
    // shared memory. Calls `emit(column, split, sum)` once per column: `sum` points to the first matrix's result, the
    // second matrix's is partition.tile_n later.
    //
    // When this returns, all copies to shared memory that the block started earlier have arrived, for all its threads.
    template <typename Emit>
    __device__ void run(const float* input, float* acc, Emit emit) {
        if (index_ >= partition_.tiles * partition_.split_k) {  // nothing to do for this block
            copy_wait<0>();
            sync_threads();
        }
#pragma unroll 1
        while (index_ < partition_.tiles * partition_.split_k) {
            accumulate_rows(input, acc);
            reduce_rows(acc);
            const int columns = min(partition_.tile_n, partition_.columns - column_);
#pragma unroll 1
            for (int c = threadIdx.x; c < columns; c += kThreads) emit(column_ + c, split_, acc + c);
            index_ += gridDim.x;
            if (index_ >= partition_.tiles * partition_.split_k) break;
            start();
            sync_threads();
        }
    }

  private:
    // Selects the tile and the split of index_, and starts this thread's first loads.
    __device__ void start() {
        split_ = index_ / partition_.tiles;
        column_ = (index_ - split_ * partition_.tiles) * partition_.tile_n;
        row_ = split_ < partition_.split_k ? split_ * partition_.split_rows : 0;
        rows_ = split_ < partition_.split_k ? min(partition_.split_rows, partition_.rows - row_) : 0;
        lane_row_ = threadIdx.x / partition_.vectors_per_row;
        const int vector = threadIdx.x - lane_row_ * partition_.vectors_per_row;
        const int vectors_per_matrix = partition_.vectors_per_row / partition_.matrices;
        const bool second = vector >= vectors_per_matrix;
        const int column = column_ + kVector * (second ? vector - vectors_per_matrix : vector);
        // A thread past the last column, or without a row, reads nothing.
        if (lane_row_ >= partition_.rows_per_iter || column >= partition_.columns) lane_row_ = partition_.rows;
        from_ = (second ? second_ : first_) + static_cast<size_t>(row_ + lane_row_) * partition_.columns + column;
        next_row_ = lane_row_;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) load(i);
    }

    // Starts the load of the next row, if there is one.
    __device__ void load(int slot) {
        if (next_row_ < rows_) copy_async(shared_address(ring_ + slot * kThreads), from_);
        copy_commit();
        next_row_ += partition_.rows_per_iter;
        from_ += partition_.rows_per_iter * partition_.columns;
    }

    // Adds this thread's rows, with kLoads in flight all the time, and stores the result to its place in `acc`.
    __device__ void accumulate_rows(const float* input, float* acc) {
        float sum[kVector] = {};
#pragma unroll 1
        for (int row = lane_row_; row < rows_;)
#pragma unroll
            for (int i = 0; i < kLoads; ++i, row += partition_.rows_per_iter) {
                copy_wait<kLoads - 1>();
                if (row < rows_) multiply_add(sum, ring_[i * kThreads], input[row]);
                load(i);
            }
        copy_wait<0>();
        float4* to = reinterpret_cast<float4*>(acc + threadIdx.x * kVector);
        to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
        to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
        sync_threads();
    }

    // Adds the results of all rows of an iteration and stores them at the beginning of `acc`. Two passes: first down to
    // as many parts as there are threads for, then to one. Both work in place, because a thread has its own column.
    __device__ void reduce_rows(float* acc) const {
        const int outputs = partition_.vectors_per_row * kVector;
        const int parts = max(1, min(partition_.rows_per_iter, kThreads / outputs));
        for (int end = partition_.rows_per_iter, left = parts;; end = parts, left = 1) {
#pragma unroll 1
            for (int i = threadIdx.x; i < left * outputs; i += kThreads) {
                float sum = 0.0f;
#pragma unroll 8
                for (int j = i; j < end * outputs; j += left * outputs) sum += acc[j];
                acc[i] = sum;
            }
            sync_threads();
            if (left == 1) return;
        }
    }

    const GemvPartition& partition_;
    uint4* ring_;
    const __half *first_, *second_;
    int index_, split_, column_, row_, rows_;
    int lane_row_;        // first row of this thread, within the split
    int next_row_;        // row of the next load, within the split
    const __half* from_;  // address of the next load
};

}  // namespace tango
