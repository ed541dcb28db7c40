// Products of up to eight vectors with matrices [rows, columns], distributed over all blocks of a grid like those of
// gemv.cuh. Each weight is read once. Tensor cores multiply: 16 columns of the weights are the 16 rows of an `mma`, the
// vectors are its 8 columns. What a vector's result is depends on no other vector.
#pragma once

#include "batch_threads.cuh"
#include "step.cuh"

namespace tango {

constexpr int kSequences = TANGO_DECODE_SEQUENCES;
constexpr int kTile = 16;                           // columns of an `mma`
constexpr int kFragmentRows = 16;                   // rows of an `mma`, and of one fragment of the input
constexpr int kRowDistance = 8;                     // of the two pairs of them that a lane has
constexpr int kMaxTiles = 24;                       // of a block's tile, over all matrices
constexpr int kTileBytes = kWarp * sizeof(float4);  // of the sums of a tile
constexpr int kBatchRingBytes = 98 << 10;           // for weights, then sums; the least
constexpr float kLowScale = 2048.0f, kInputScale = 16.0f;
static_assert(kSequences == 8, "an mma has 8 columns");

// An input as `mma` takes it. A fragment has 16 rows of all sequences: each lane's part is rows 2 t, 2 t + 1, 2 t + 8
// and 2 t + 9 of sequence s, for lane 4 s + t. So that nothing of fp32 is lost, a sixteenth of an element is split into
// fp16 (the first two words) and 2048 times the rest (the other two).
using Fragment = uint4;  // of a lane

// The input of a GEMV in shared memory: fragments, or what they will be made of, in fp32.
struct BatchInput {
    Fragment* fragments;
    float* unit_sums;     // [rows / kUnit, sequences], for integers: a 16th of the sum of a unit's rows, as a subnormal
    const float* scales;  // [sequences], of what is in fp32: a sixteenth, times the factor of a norm
};

constexpr int kInputRows = 128;  // an input is filled up to a multiple of
constexpr int kUnitInputBytes = kUnit / kFragmentRows * kWarp * sizeof(Fragment) + kSequences * sizeof(float);

// Units of an input of so many rows, filled up.
__host__ __device__ constexpr int input_units(int rows) { return ceil_div(rows, kInputRows) * (kInputRows / kUnit); }

// Splits sixteenths of two elements.
__device__ inline uint32_t split_pair(float a, float b, uint32_t& low) {
    const __half2 high = __floats2half2_rn(a, b);
    const float2 rounded = __half22float2(high);
    low = bits_of(__floats2half2_rn((a - rounded.x) * kLowScale, (b - rounded.y) * kLowScale));
    return bits_of(high);
}

__device__ inline Fragment make_fragment(float a, float b, float c, float d) {
    Fragment fragment;
    fragment.x = split_pair(a, b, fragment.z);
    fragment.y = split_pair(c, d, fragment.w);
    return fragment;
}

// sum[16, 8] += weights[16, 16] input[16, 8].
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&weights)[4], const Fragment& input) {
    float low[4] = {};
    mma(sum, weights, {input.x, input.y});
    mma(low, weights, {input.z, input.w});
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += low[i] / kLowScale;
}

// How a GEMV is distributed: a part is a tile of columns of a split of the rows. A block has every gridDim.x-th part.
struct BatchPartition {
    int matrices;             // one, or two that share their input
    int rows, columns;        // of a matrix
    int tile_n, tiles;        // columns of a tile; number of tiles
    int split_rows, split_k;  // rows of a split; number of splits
};

class BatchPart {
  public:
    __device__ explicit BatchPart(const BatchPartition& partition) : partition_(partition), index_(blockIdx.x) {
        select();
    }

    __device__ bool is_valid() const { return split_ < partition_.split_k; }

    // The block's next part.
    __device__ void advance() {
        index_ += gridDim.x;
        select();
    }

    // First row and number of rows of the input that the block needs: those of its split, which all its parts have.
    __device__ int row() const { return row_; }
    __device__ int rows() const { return rows_; }

    // The tile, and its columns.
    __device__ int tile() const { return index_ - split_ * partition_.tiles; }
    __device__ int column() const { return column_; }
    __device__ int columns() const { return tiles_ * kTile; }

  protected:
    // Selects the tile and the split of index_.
    __device__ void select() {
        split_ = index_ / partition_.tiles;
        column_ = (index_ - split_ * partition_.tiles) * partition_.tile_n;
        row_ = is_valid() ? split_ * partition_.split_rows : 0;
        rows_ = is_valid() ? min(partition_.split_rows, partition_.rows - row_) : 0;
        tiles_ = min(partition_.tile_n, partition_.columns - column_) / kTile;
    }

    const BatchPartition& partition_;
    int index_, split_, column_, row_, rows_;
    int tiles_;  // of 16 columns
};

// A GEMV of a block, whose weights are BatchRows or BatchColumns: a BatchPart whose accumulate() adds what each warp
// has of it, and whose total() gives the sum of all warps.
template <typename Weights>
class BatchGemv : public Weights {
  public:
    using Weights::Weights;

    // Computes the part. `input` begins with row(). Calls `emit(column, split, sequence, sum, second)` once per column
    // and sequence, with the result of the first matrix and that of the second if there are two.
    //
    // When this returns, all copies to shared memory that the block started earlier have arrived, for all its threads,
    // and the ring is free.
    template <typename Emit>
    __device__ void run(const BatchInput& input, Emit emit) {
        if (!this->is_valid()) {  // nothing to do for this block
            copy_wait<0>();
            sync_batch();
            return;
        }
        this->accumulate(input);
#pragma unroll 1
        for (int i = threadIdx.x; i < this->tiles_ * kWarp; i += kBatchThreads) emit_lane(i / kWarp, i % kWarp, emit);
        sync_batch();
    }

  private:
    // What a lane has of a tile's results: two columns of two sequences.
    template <typename Emit>
    __device__ void emit_lane(int tile, int lane, Emit emit) const {
        const float4 first = this->total(0, tile, lane);
        const float4 second = this->partition_.matrices == 2 ? this->total(1, tile, lane) : first;
        const int column = this->column_ + tile * kTile + Weights::column(lane), sequence = lane % 4 * 2;
        emit(column, this->split_, sequence, first.x, second.x);
        emit(column, this->split_, sequence + 1, first.y, second.y);
        emit(column + Weights::kDistance, this->split_, sequence, first.z, second.z);
        emit(column + Weights::kDistance, this->split_, sequence + 1, first.w, second.w);
    }
};

}  // namespace tango
