// Products of one vector with matrices [rows, columns] (GEMV), distributed over all blocks of a grid. Each weight is
// read once and used once, so all that matters is to keep memory reads in flight.
#pragma once

#include "common/integers.cuh"
#include "tango/linear.h"
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

// The same for bytes: the columns of one load.
__device__ inline void multiply_add(float (&acc)[2 * kVector], const uint4& vector, float factor) {
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 low = __half22float2(half2_of(unpack_signed<0, 1>(words[i])));
        const float2 high = __half22float2(half2_of(unpack_signed<2, 3>(words[i])));
        acc[4 * i] += low.x * factor;
        acc[4 * i + 1] += low.y * factor;
        acc[4 * i + 2] += high.x * factor;
        acc[4 * i + 3] += high.y * factor;
    }
}

// Shared memory that weights go through.
struct Ring {
    uint4* memory;
    int bytes;
};

// A block's part of a GEMV: some pairs of a tile and a split, one after the other.
class GemvPart {
  public:
    __device__ explicit GemvPart(const GemvPartition& partition) : partition_(partition), index_(blockIdx.x) {
        select();
    }

    // First row and number of rows of the input that the block needs: those of its split.
    __device__ int row() const { return row_; }
    __device__ int rows() const { return rows_; }

  protected:
    __device__ bool is_valid() const { return index_ < partition_.tiles * partition_.split_k; }

    // Selects the tile and the split of index_.
    __device__ void select() {
        split_ = index_ / partition_.tiles;
        column_ = (index_ - split_ * partition_.tiles) * partition_.tile_n;
        row_ = split_ < partition_.split_k ? split_ * partition_.split_rows : 0;
        rows_ = split_ < partition_.split_k ? min(partition_.split_rows, partition_.rows - row_) : 0;
    }

    const GemvPartition& partition_;
    int index_, split_, column_, row_, rows_;
};

// The GEMV of matrices that lie by rows, fp16 or bytes with a scale for each column.
//
// The loads of a thread go through its own ring in shared memory, which needs neither registers nor barriers. start()
// begins the first loads, because weights depend on no other block. So they are in flight while the block waits for the
// blocks that compute its input.
template <typename Element>
class RowGemv : public GemvPart {
  public:
    __device__ RowGemv(const GemvPart& part, const Ring& ring, const TangoMatrix& first, const TangoMatrix& second)
        : GemvPart(part), ring_(ring.memory + threadIdx.x), first_(first), second_(second) {
        seek();
    }

    // Starts the first loads of the block's part.
    __device__ void start() {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) load(i);
    }

    // To be called where another object has started them.
    __device__ void skip_started() {
        next_row_ += kLoads * rows_per_iter();
        from_ += static_cast<size_t>(kLoads) * rows_per_iter() * partition_.columns;
    }

    // Computes the block's part. `input` is in shared memory and begins with row(); `acc` is kAccumulatorFloats of
    // shared memory, followed by the ring. Calls `emit(column, split, sum, second)` once per column: with the result of
    // the first matrix, and of the second if there are two.
    //
    // When this returns, all copies to shared memory that the block started earlier have arrived, for all its threads.
    template <typename Emit>
    __device__ void run(const float* input, float* acc, Emit emit) {
        if (!is_valid()) {  // nothing to do for this block
            copy_wait<0>();
            sync_threads();
        }
#pragma unroll 1
        while (is_valid()) {
            const float own_scale = kIsInteger ? scale(threadIdx.x) : 1.0f;  // loaded ahead
            accumulate_rows(input, acc);
            reduce_rows(acc, own_scale);
            const int columns = min(partition_.tile_n, partition_.columns - column_);
            const int second = partition_.matrices == 2 ? partition_.tile_n : 0;
#pragma unroll 1
            for (int c = threadIdx.x; c < columns; c += kThreads) emit(column_ + c, split_, acc[c], acc[c + second]);
            index_ += gridDim.x;
            if (!is_valid()) break;
            if (kIsInteger) sync_threads();  // some of the results may lie in the ring
            select();
            seek();
            start();
            sync_threads();
        }
    }

  private:
    static constexpr bool kIsInteger = sizeof(Element) == 1;
    static constexpr int kElements = sizeof(uint4) / sizeof(Element);  // columns of a load

    // Finds this thread's first load.
    __device__ void seek() {
        lane_row_ = threadIdx.x / vectors_per_row();
        const int vector = threadIdx.x - lane_row_ * vectors_per_row();
        const int vectors_per_matrix = vectors_per_row() / partition_.matrices;
        const bool second = vector >= vectors_per_matrix;
        const int column = column_ + kElements * (second ? vector - vectors_per_matrix : vector);
        // A thread past the last column, or without a row, reads nothing.
        if (lane_row_ >= rows_per_iter() || column >= partition_.columns) lane_row_ = partition_.rows;
        const void* values = second ? second_.values : first_.values;
        from_ =
            static_cast<const Element*>(values) + static_cast<size_t>(row_ + lane_row_) * partition_.columns + column;
        next_row_ = lane_row_;
    }

    // How many loads a row of the tile takes, and how many such rows the block reads at a time. The partition has them
    // for fp16.
    __device__ int vectors_per_row() const { return partition_.vectors_per_row / (kElements / kVector); }
    __device__ int rows_per_iter() const {
        return kIsInteger ? kThreads / vectors_per_row() : partition_.rows_per_iter;
    }

    // The scale of a result: those of the second matrix follow those of the first.
    __device__ float scale(int output) const {
        const bool second = output >= partition_.tile_n;
        const int column = column_ + (second ? output - partition_.tile_n : output);
        if (column >= partition_.columns || output >= partition_.matrices * partition_.tile_n) return 0.0f;
        return static_cast<const float*>(second ? second_.scales : first_.scales)[column];
    }

    // Starts the load of the next row, if there is one.
    __device__ void load(int slot) {
        if (next_row_ < rows_) copy_async(shared_address(ring_ + slot * kThreads), from_);
        copy_commit();
        next_row_ += rows_per_iter();
        from_ += rows_per_iter() * partition_.columns;
    }

    // Adds this thread's rows, with kLoads in flight all the time, and stores the result to its place in `acc`.
    __device__ void accumulate_rows(const float* input, float* acc) {
        float sum[kElements] = {};
#pragma unroll 1
        for (int row = lane_row_; row < rows_;)
#pragma unroll
            for (int i = 0; i < kLoads; ++i, row += rows_per_iter()) {
                copy_wait<kLoads - 1>();
                if (row < rows_) multiply_add(sum, ring_[i * kThreads], input[row]);
                load(i);
            }
        copy_wait<0>();
        if (kIsInteger) sync_threads();  // the sums take some of the ring
        float4* to = reinterpret_cast<float4*>(acc + threadIdx.x * kElements);
#pragma unroll
        for (int i = 0; i < kElements / 4; ++i)
            to[i] = make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
        sync_threads();
    }

    // Adds the results of all rows of an iteration and stores them at the beginning of `acc`. Two passes: first down to
    // as many parts as there are threads for, then to one. Both work in place, because a thread has its own column.
    __device__ void reduce_rows(float* acc, float own_scale) const {
        const int outputs = vectors_per_row() * kElements;
        const int parts = max(1, min(rows_per_iter(), kThreads / outputs));
        for (int end = rows_per_iter(), left = parts;; end = parts, left = 1) {
#pragma unroll 1
            for (int i = threadIdx.x; i < left * outputs; i += kThreads) {
                float sum = 0.0f;
#pragma unroll 8
                for (int j = i; j < end * outputs; j += left * outputs) sum += acc[j];
                if (kIsInteger && left == 1) sum *= i == static_cast<int>(threadIdx.x) ? own_scale : scale(i);
                acc[i] = sum;
            }
            sync_threads();
            if (left == 1) return;
        }
    }

    uint4* ring_;
    const TangoMatrix &first_, &second_;
    int lane_row_;         // first row of this thread, within the split
    int next_row_;         // row of the next load, within the split
    const Element* from_;  // address of the next load
};

}  // namespace tango
