// Products of one vector with matrices [rows, columns] (GEMV), distributed over all blocks of a grid. Each weight is
// read once and used once, so all that matters is to keep memory reads in flight.
#pragma once

#include "common/integers.cuh"
#include "divisor.cuh"
#include "tango/linear.h"
#include "threads.cuh"

namespace tango {

constexpr int kVector = 8;        // fp16 elements of one load
constexpr int kSector = 16;       // columns of the smallest memory access: 32 bytes
constexpr int kLoads = 4;         // loads that a thread keeps in flight: 32 KB per SM
constexpr int kMaxVectors = 256;  // of a row of a tile, so that a block reads at least two rows at a time
constexpr int kRowPadding = 4;    // floats between two rows of accumulators: lanes read several rows at once
constexpr int kAccumulatorFloats = kThreads * (kVector + kRowPadding / 2);  // shared memory for them
constexpr int kNoRow = 1 << 28;                                             // of a thread that reads nothing

// How a GEMV is distributed. The columns are cut into tiles. Where these are too few to keep all blocks busy, the rows
// are cut as well (split-K), and whoever reads the result adds the partial results. One thread reads one vector of a
// row of a tile, over all matrices, so a block reads `rows_per_iter` rows at a time.
struct GemvPartition {
    int matrices;             // one, or two that share their input
    int rows, columns;        // of a matrix
    int tile_n, tiles;        // columns of a tile; number of tiles
    int split_rows, split_k;  // rows of a split; number of splits
    Divisor vectors_per_row;  // of a tile, over all matrices
    int rows_per_iter;
    int lanes_shift;  // of the lanes that add the accumulators of a column, a power of two, its logarithm
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
            const float2 own_scales = scales(threadIdx.x >> partition_.lanes_shift);  // loaded ahead
            accumulate_rows(input, acc);
            emit_columns(acc, own_scales, emit);
            if (kIsInteger) sync_threads();  // some of the sums may lie in the ring
            index_ += gridDim.x;
            if (!is_valid()) break;
            select();
            seek();
            start();
            sync_threads();
        }
    }

  private:
    static constexpr bool kIsInteger = sizeof(Element) == 1;
    static constexpr int kElements = sizeof(uint4) / sizeof(Element);  // columns of a load
    static constexpr int kVectors = kElements / kVector;               // of fp16, as a partition counts them

    // Finds this thread's first load.
    __device__ void seek() {
        lane_row_ = partition_.vectors_per_row.divide(threadIdx.x * kVectors);
        const int vector = threadIdx.x - lane_row_ * vectors_per_row();
        const int vectors_per_matrix = vectors_per_row() >> (partition_.matrices - 1);
        const bool second = vector >= vectors_per_matrix;
        const int column = column_ + kElements * (second ? vector - vectors_per_matrix : vector);
        const void* values = second ? second_.values : first_.values;
        from_ =
            static_cast<const Element*>(values) + static_cast<size_t>(row_ + lane_row_) * partition_.columns + column;
        if (lane_row_ >= rows_per_iter() || column >= partition_.columns) lane_row_ = kNoRow;
        next_row_ = lane_row_;
    }

    // How many loads a row of the tile takes, and how many such rows the block reads at a time. The partition has them
    // for fp16.
    __device__ int vectors_per_row() const { return partition_.vectors_per_row.value / kVectors; }
    __device__ int rows_per_iter() const {
        return kIsInteger ? partition_.vectors_per_row.divide(kThreads * kVectors) : partition_.rows_per_iter;
    }

    // The scales of a column of the tile: in the first matrix, and in the second.
    __device__ float2 scales(int c) const {
        float2 scales = make_float2(1.0f, 1.0f);
        if (!kIsInteger || c >= partition_.tile_n || column_ + c >= partition_.columns) return scales;
        scales.x = static_cast<const float*>(first_.scales)[column_ + c];
        if (partition_.matrices == 2) scales.y = static_cast<const float*>(second_.scales)[column_ + c];
        return scales;
    }

    // Floats from one row's accumulators to the next's.
    __device__ int pitch() const { return vectors_per_row() * kElements + kRowPadding; }

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
        if (lane_row_ != kNoRow) {
            const int vector = threadIdx.x - lane_row_ * vectors_per_row();
            float4* to = reinterpret_cast<float4*>(acc + lane_row_ * pitch() + vector * kElements);
#pragma unroll
            for (int i = 0; i < kElements / 4; ++i)
                to[i] = make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
        }
        sync_threads();
    }

    // Adds the accumulators of all rows of an iteration. A few neighboring lanes share a column.
    template <typename Emit>
    __device__ void emit_columns(const float* acc, const float2& own_scales, Emit emit) const {
        const int shift = partition_.lanes_shift, lanes = 1 << shift, part = threadIdx.x & (lanes - 1);
        const int columns = min(partition_.tile_n, partition_.columns - column_), step = lanes * pitch();
        const bool two = partition_.matrices == 2;
#pragma unroll 1
        for (int first = 0; first < columns; first += kThreads >> shift) {
            const int c = first + (threadIdx.x >> shift), end = c < columns ? rows_per_iter() : 0;
            const float* from = acc + part * pitch() + c;
            float sum = 0.0f, up = 0.0f;
#pragma unroll 4
            for (int row = part; row < end; row += lanes, from += step) {
                sum += from[0];
                if (two) up += from[partition_.tile_n];
            }
#pragma unroll 1
            for (int offset = lanes / 2; offset > 0; offset /= 2) {
                sum += __shfl_xor_sync(kAllLanes, sum, offset);
                if (two) up += __shfl_xor_sync(kAllLanes, up, offset);
            }
            if (c >= columns || part > 0) continue;
            const float2 scale = kIsInteger && first > 0 ? scales(c) : own_scales;
            emit(column_ + c, split_, sum * scale.x, up * scale.y);
        }
    }

    uint4* ring_;
    const TangoMatrix &first_, &second_;
    int lane_row_;         // first row of this thread, within the split
    int next_row_;         // row of the next load, within the split
    const Element* from_;  // address of the next load
};

}  // namespace tango
