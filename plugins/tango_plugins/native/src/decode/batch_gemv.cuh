// Products of up to eight vectors with matrices [rows, columns], distributed over all blocks of a grid like those of
// gemv.cuh. Each weight is read once. Tensor cores multiply: 16 columns of the weights are the 16 rows of an `mma`, the
// vectors are its 8 columns. What a vector's result is depends on no other vector.
#pragma once

#include "step.cuh"

namespace tango {

constexpr int kSequences = TANGO_DECODE_SEQUENCES;
constexpr int kFragmentRows = 16;                   // rows of an `mma`, and of one fragment of the input
constexpr int kInputRows = 128;                     // inputs are filled up to a multiple of it: whole steps
constexpr int kMaxTiles = 24;                       // of a block's tile, over all matrices: at most two for a warp
constexpr int kTileBytes = kWarp * sizeof(float4);  // of the sums of a tile
constexpr float kLowScale = 2048.0f, kInputScale = 16.0f;
static_assert(kSequences == 8, "an mma has 8 columns");

// The input of a GEMV, as `mma` takes it. A fragment has 16 rows of all sequences: lane 4 s + t has four rows of
// sequence s. So that nothing of fp32 is lost, a sixteenth of an element is split into fp16 (the first two words) and
// 2048 times the rest (the other two).
using Fragment = uint4;  // of a lane

// The order of an input's rows is that of the weights that it is multiplied by.
enum { kByRows, kInBlocks8, kInBlocks4, kOrders };
constexpr int kUnitBytes = kUnit / kFragmentRows * kWarp * sizeof(Fragment);

__device__ inline int order_of(const TangoMatrix& weights) {
    return weights.weights == TANGO_WEIGHTS_BLOCKS_4   ? kInBlocks4
           : weights.weights == TANGO_WEIGHTS_BLOCKS_8 ? kInBlocks8
                                                       : kByRows;
}

// Whether a lane's part of a fragment is of the first `rows` rows, a multiple of 16.
__device__ inline bool has_rows(int order, int fragment, int rows) {
    return order == kInBlocks4 ? fragment / 2 * kUnit + lane_id() % 4 * 8 < rows : fragment * kFragmentRows < rows;
}

// Where an element of row `row` of the first sequence is, in bytes from the first of 32 rows; one more if the weights
// of this row are kOdd times what they should be.
__device__ inline int place_of(int order, int row) {
    if (order == kByRows) return (row / 16 * kWarp + row % 8 / 2) * 16 + row % 16 / 8 * 4 + row % 2 * 2;
    const int deep = order == kInBlocks4, own = row % (4 << deep);  // what a lane has follows each other
    const int fragment = deep ? row % 2 : row / 16, t = row % (16 << deep) >> (2 + deep), i = own >> deep;
    return (fragment * kWarp + t) * 16 + i % 2 * 4 + i / 2 * 2 + (deep & fragment);
}

// Stores an element of an input. `places` are place_of() of its order.
__device__ inline void put(const uint16_t* places, Fragment* input, int row, int sequence, float x) {
    const int place = places[row % kUnit];
    x *= place % 2 == 0 ? 1.0f / kInputScale : 1.0f / (kInputScale * PackedInts<4>::kOdd);
    const __half high = __float2half_rn(x);
    char* const unit = reinterpret_cast<char*>(input) + row / kUnit * kUnitBytes;
    __half* const to = reinterpret_cast<__half*>(unit + sequence * 4 * sizeof(Fragment) + place / 2 * 2);
    __stcg(to, high);
    __stcg(to + 4, __float2half_rn((x - __half2float(high)) * kLowScale));
}

// A lane's results of a GEMV: two columns of two sequences, of a tile of each of two matrices. Or of two tiles of one.
struct BatchResults {
    float4 first, second;
    int column, distance;  // in the tile, of the two columns
};

// Adds a block's part of a GEMV, whose weights are BatchRows or BatchBlocks: GemvParts whose accumulate() adds what
// each warp has of it, and whose total() gives the sum of all warps. `input` has the fragments from row() on. What warp
// w gets is tile w, or tiles w and w + kWarps.
//
// When this returns, all copies to shared memory that the block started earlier have arrived, for all its threads.
template <typename Weights>
__device__ BatchResults accumulate(Weights& weights, const Fragment* input) {
    weights.accumulate(input);
    BatchResults results = {{}, {}, weights.lane_column(), Weights::kDistance};
    const int matrices = weights.partition().matrices, next = warp_id() + (matrices == 2 ? 0 : kWarps);
    if (weights.is_valid() && warp_id() < weights.tiles()) results.first = weights.total(0, warp_id());
    if (weights.is_valid() && next < weights.tiles()) results.second = weights.total(matrices - 1, next);
    return results;
}

}  // namespace tango
