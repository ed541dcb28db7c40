// Products of one vector with fp16 matrices [rows, columns], shared out among all blocks of a grid. What counts is to
// keep the memory busy: each weight is read once and used once.
#pragma once

#include <cuda_fp16.h>

#include "machine.cuh"

namespace tango {

constexpr int kVector = 8;         // fp16 numbers of one load
constexpr int kSector = 16;        // columns that the memory gives at the least: 32 bytes
constexpr int kLoads = 4;          // of a thread under way: 32 KB on a multiprocessor
constexpr int kMostVectors = 256;  // of a row of a strip, so that two rows are read at a time
constexpr int kSumFloats = kThreads * kVector;  // shared memory that a product takes

// How a product is shared out: strips of columns, and where these are too few to keep all blocks busy, slices of rows,
// whose sums are added by whoever reads the result. A row of a strip, of all matrices, is `vectors` wide; one thread
// each reads them, so that a block reads `groups` rows at a time.
struct Share {
    int matrices;       // one, or two that take the same input
    int rows, columns;  // of a matrix
    int strip, strips;  // columns of a strip; how many there are
    int slice, slices;  // rows of a slice; how many there are
    int vectors, groups;
};

__device__ inline void multiply_add(float (&sum)[kVector], const uint4& vector, float factor) {
    const __half2* pairs = reinterpret_cast<const __half2*>(&vector);
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
        const float2 pair = __half22float2(pairs[i]);
        sum[2 * i] += pair.x * factor;
        sum[2 * i + 1] += pair.y * factor;
    }
}

// A block's part of the product of one vector with a matrix, or with two: pieces, each a strip of a slice.
//
// A thread's loads go through a ring of its own in shared memory, which needs no registers and no barrier. The first of
// them depend on nothing, so they are under way from when the object is made: before the block waits for the others, who
// make the input.
class Product {
  public:
    __device__ Product(const Share& share, uint4* ring, const void* first, const void* second)
        : share_(share),
          ring_(ring + threadIdx.x),
          first_(static_cast<const __half*>(first)),
          second_(static_cast<const __half*>(second)),
          index_(blockIdx.x) {
        start();
    }

    // Where the block's input begins, and how much of it there is: all rows, or those of its slice.
    __device__ int row() const { return row_; }
    __device__ int rows() const { return rows_; }

    // `input` is in shared memory and begins with row(); `sums` is kSumFloats of it. `emit(column, slice, sum)` is called
    // once for each column of each piece; `sum` points to that of the first matrix, the second's is share.strip behind.
    //
    // What the block had begun to copy to shared memory before, has come to all its threads when this returns.
    template <typename Emit>
    __device__ void run(const float* input, float* sums, Emit emit) {
        if (index_ >= share_.strips * share_.slices) {  // no piece for this block
            copy_wait<0>();
            sync_threads();
        }
#pragma unroll 1
        while (index_ < share_.strips * share_.slices) {
            add_rows(input, sums);
            add_groups(sums);
            const int columns = min(share_.strip, share_.columns - column_);
#pragma unroll 1
            for (int c = threadIdx.x; c < columns; c += kThreads) emit(column_ + c, slice_, sums + c);
            index_ += gridDim.x;
            if (index_ >= share_.strips * share_.slices) break;
            start();
            sync_threads();
        }
    }

  private:
    // Takes up a piece, and begins this thread's first loads.
    __device__ void start() {
        slice_ = index_ / share_.strips;
        column_ = (index_ - slice_ * share_.strips) * share_.strip;
        row_ = slice_ < share_.slices ? slice_ * share_.slice : 0;
        rows_ = slice_ < share_.slices ? min(share_.slice, share_.rows - row_) : 0;
        group_ = threadIdx.x / share_.vectors;
        const int vector = threadIdx.x - group_ * share_.vectors, each = share_.vectors / share_.matrices;
        const bool second = vector >= each;
        const int column = column_ + kVector * (second ? vector - each : vector);
        // What lies past the last column or has no row is nobody's.
        if (group_ >= share_.groups || column >= share_.columns) group_ = share_.rows;
        from_ = (second ? second_ : first_) + static_cast<size_t>(row_ + group_) * share_.columns + column;
        next_ = group_;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) load(i);
    }

    // Begins the next load, if there is one more row.
    __device__ void load(int slot) {
        if (next_ < rows_) copy_async(shared_address(ring_ + slot * kThreads), from_);
        copy_commit();
        next_ += share_.groups;
        from_ += share_.groups * share_.columns;
    }

    // This thread's rows, summed, to its place in `sums`; kLoads of them are under way all the time.
    __device__ void add_rows(const float* input, float* sums) {
        float sum[kVector] = {};
#pragma unroll 1
        for (int row = group_; row < rows_;)
#pragma unroll
            for (int i = 0; i < kLoads; ++i, row += share_.groups) {
                copy_wait<kLoads - 1>();
                if (row < rows_) multiply_add(sum, ring_[i * kThreads], input[row]);
                load(i);
            }
        copy_wait<0>();
        float4* to = reinterpret_cast<float4*>(sums + threadIdx.x * kVector);
        to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
        to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
        sync_threads();
    }

    // The sums of all groups, to the beginning of `sums`: first to as many parts as there are threads for. Both times in
    // place, since a thread has a column of its own.
    __device__ void add_groups(float* sums) const {
        const int outputs = share_.vectors * kVector, parts = max(1, min(share_.groups, kThreads / outputs));
        for (int end = share_.groups, left = parts;; end = parts, left = 1) {
#pragma unroll 1
            for (int i = threadIdx.x; i < left * outputs; i += kThreads) {
                float total = 0.0f;
#pragma unroll 8
                for (int j = i; j < end * outputs; j += left * outputs) total += sums[j];
                sums[i] = total;
            }
            sync_threads();
            if (left == 1) return;
        }
    }

    const Share& share_;
    uint4* ring_;
    const __half *first_, *second_;
    int index_, slice_, column_, row_, rows_;
    int group_;
    int next_;            // row of the next load, within the piece
    const __half* from_;  // where it is
};

}  // namespace tango
