// Matrices that lie by columns, for products of several vectors.
#pragma once

#include "batch_gemv.cuh"
#include "block_gemv.cuh"

namespace tango {

static_assert(kTile == kTileOutputs, "a tile is what is interleaved");

constexpr int kBandTiles = 4;  // that a warp multiplies by the same input
constexpr int kBandColumns = kBandTiles * kTile;
constexpr int kBandBytes = kBandColumns * 64;      // of a step's weights
constexpr int kMaxScaleWords = 3, kZeroWords = 2;  // of a column in a step, that hold its scales and zero points
constexpr int kMaxStepBytes = kBandBytes + kBandColumns * 4 * (kMaxScaleWords + kZeroWords);

// The weights of matrices by columns, FP8 or blocks along the rows with a scale each (kWeights is of TangoWeights), in
// steps: the next 64 bytes of each column of a band of tiles, which share what is read of the input. The steps of all
// bands are one sequence, of which each warp has an equal share; where a warp begins or ends inside of a band, the sums
// of several warps are added. All of a warp's loads go through its ring in shared memory.
//
// Integers are multiplied as they are stored, exactly. Their zero point times the sum of the inputs is subtracted from
// the sum of a block's products, and the rest is scaled.
template <int kWeights>
class BatchColumns : public BatchPart {
  public:
    __device__ BatchColumns(const BatchPart& part, const Ring& ring, const TangoMatrix& first,
                            const TangoMatrix& second)
        : BatchPart(part),
          lane_(opaque(lane_id())),
          warp_(opaque(warp_id())),
          sums_(reinterpret_cast<float4*>(ring.memory)),
          first_(first),
          second_(second) {
        shift_ = first.group >> 6;
        const BlockPlaces places =
            kIsFp8 ? BlockPlaces{0, partition_.rows, false} : places_of(first, partition_.rows, kTile);
        blocks_ = places.blocks;
        column_bytes_ = places.row_bytes;
        interleaved_ = places.interleaved;
        scale_words_ = ((kStepUnits >> shift_) + 1) / 2;
        // An odd column's begin in the middle of a word.
        if (!interleaved_ && kStepUnits >> shift_ > 1) scale_words_ += blocks_ % 2;
        if (scale_words_ == 0) scale_words_ = 1;
        has_zeros_ = first.zeros != nullptr;
        step_bytes_ = kBandBytes;
        if (!kIsFp8) step_bytes_ += kBandColumns * 4 * (scale_words_ + (has_zeros_ ? kZeroWords : 0));
        depth_ = min(kMaxSteps, ring.bytes / (kBatchWarps * step_bytes_));
        ring_ = reinterpret_cast<char*>(ring.memory) + warp_ * depth_ * step_bytes_;
        seek();
    }

    // Starts the first loads of the block's part.
    __device__ void start() {
#pragma unroll 1
        for (int i = 0; i < depth_; ++i) load(ring_ + i * step_bytes_);
    }

  protected:
    static constexpr int kDistance = 8;  // of a lane's two columns

    // Finds this warp's steps.
    __device__ void seek() {
        unit_ = row_ / kUnit;
        units_ = ceil_div(rows_, kUnit);
        band_steps_ = max(1, ceil_div(units_, kStepUnits));
        steps_ = is_valid() ? ceil_div(all_tiles(), kBandTiles) * band_steps_ : 0;
        const int sharers = max(1, min(kBatchWarps, steps_));
        begin_ = min(warp_, sharers) * steps_ / sharers;
        end_ = min(warp_ + 1, sharers) * steps_ / sharers;
        next_ = begin_;
        band_ = begin_ / band_steps_;
        next_unit_ = (begin_ - band_ * band_steps_) * kStepUnits;
    }

    // Adds this warp's steps, with depth_ in flight all the time, and stores the sums of each band in the place of the
    // ring. A warp's steps are of two bands at most.
    __device__ void accumulate(const BatchInput& input) {
        static_assert(kMaxTiles / kBandTiles <= kBatchWarps);
        Sums first = {}, sums = {};
        const int band = begin_ / band_steps_, end_of_first = (band + 1) * band_steps_;
        char* slot = ring_;
#pragma unroll 1
        for (int step = begin_, at = begin_ - band * band_steps_; step < end_; ++step, ++at) {
            if (step == end_of_first) first = sums, sums = {}, at = 0;
            wait();
            __syncwarp();
            multiply(sums, slot, input, at);
            __syncwarp();
            load(slot);
            slot = slot == ring_ + (depth_ - 1) * step_bytes_ ? ring_ : slot + step_bytes_;
        }
        copy_wait<0>();
        sync_batch();
        // A warp and a band of its have a place of their own: the next warp's bands begin where this one's end.
        float4* const to = sums_ + (warp_ + band) * kBandTiles * kWarp + lane_;
        const bool is_two = end_of_first < end_;
#pragma unroll
        for (int i = 0; i < kBandTiles; ++i) {
            if (is_two) to[i * kWarp] = first.of(i);
            if (begin_ < end_) to[(is_two * kBandTiles + i) * kWarp] = sums.of(i);
        }
        sync_batch();
    }

    // The results of a tile in a lane, of the first matrix or the second: two columns of two sequences.
    __device__ float4 total(int matrix, int tile, int lane) const {
        const int index = matrix * tiles_ + tile, band = index / kBandTiles;
        const int last = warp_of((band + 1) * band_steps_ - 1);
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int warp = warp_of(band * band_steps_); warp <= last; ++warp)
            sum = sum + sums_[((warp + band) * kBandTiles + index % kBandTiles) * kWarp + lane];
        const float scale = kInputScale * (kIsFp8 ? fp8_scale(matrix == 0 ? first_ : second_) : 1.0f / kSubnormal);
        return make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale);
    }

    // The first of a lane's two columns of a tile.
    __device__ static int column(int lane) { return lane / 4; }

  private:
    static constexpr bool kIsFp8 = kWeights == TANGO_WEIGHTS_FP8;
    static constexpr int kBits = kWeights == TANGO_WEIGHTS_BLOCKS_4 ? 4 : 8;
    static constexpr int kMaxSteps = kBits == 4 ? 3 : 4;  // of a warp that are in flight
    using Ints = PackedInts<kBits>;
    using Eight = typename Ints::Eight;
    static constexpr int kUnitBytes = kUnit * kBits / 8;
    static constexpr int kStepUnits = 64 / kUnitBytes;
    static_assert((kBatchWarps + kMaxTiles / kBandTiles) * kBandTiles * kTileBytes <= kBatchRingBytes,
                  "sums do not fit");
    static_assert(2 * kBatchWarps * kMaxStepBytes <= kBatchRingBytes, "rings do not fit");

    // What a lane has of a band: of each tile, two columns of two sequences.
    struct Sums {
        float at[kBandTiles][4];

        __device__ float4 of(int tile) const { return make_float4(at[tile][0], at[tile][1], at[tile][2], at[tile][3]); }
    };

    // And of the products of a block: with the input's first halves and with its second, and the sums of what they were
    // multiplied by.
    struct Products {
        float exact[kBandTiles][4], rest[kBandTiles][4];
        float2 inputs;
    };

    // Starts a copy of 16 bytes of a column. FP8 is not interleaved, so what is around is its own next steps.
    __device__ static void load_piece(SharedAddress to, const char* from) {
        if constexpr (kIsFp8)
            copy_async_prefetch(to, from);
        else
            copy_async(to, from);
    }

    // Waits for the oldest of the steps in flight. There are not more than kMaxSteps, but without the last branches
    // nvcc makes other code of all formats, with which INT4 takes 1.5 % longer on sm_90a.
    __device__ void wait() const {
        if (depth_ == 2)
            copy_wait<1>();
        else if (depth_ == 3)
            copy_wait<2>();
        else if (depth_ == 4)
            copy_wait<3>();
        else if (depth_ == 5)
            copy_wait<4>();
        else
            copy_wait<5>();
    }

    // Tiles of both matrices: those of the second follow those of the first.
    __device__ int all_tiles() const { return partition_.matrices * tiles_; }
    __device__ const TangoMatrix& matrix_of(int tile) const { return tile >= tiles_ ? second_ : first_; }
    __device__ int column_of(int tile, int column) const {
        return column_ + (tile >= tiles_ ? tile - tiles_ : tile) * kTile + column;
    }

    // Bytes of a column's zero points.
    __device__ int zero_bytes() const { return (blocks_ * kBits + 7) / 8; }

    // The block that a unit of the split is in.
    __device__ unsigned block_of(int unit) const { return static_cast<unsigned>(unit_ + unit) >> shift_; }

    // Starts the loads of the next step, if there is one: a lane brings 16 bytes of two columns of each tile, 8 apart.
    __device__ void load(char* slot) {
        if (next_ < end_) {
            const SharedAddress to = shared_address(slot);
            const int byte = next_unit_ * kUnitBytes + lane_ % 4 * 16, bytes = kIsFp8 ? rows_ : units_ * kUnitBytes;
            // The last 16 of FP8's rows may be half of a unit. Whatever the other half is, its input is zero.
            if (byte < bytes) {
                const SharedAddress own = to + offset(lane_ / 4, lane_ % 4);
                const int distance = interleaved_ ? kPieceBytes : column_bytes_;  // of two columns
                const int first = (unit_ + next_unit_) * kUnitBytes * (interleaved_ ? kTile : 1);
#pragma unroll
                for (int i = 0; i < kBandTiles; ++i) {
                    const int tile = band_ * kBandTiles + i;
                    if (tile >= all_tiles()) continue;
                    const char* const from = static_cast<const char*>(matrix_of(tile).values) +
                                             column_of(tile, 0) * static_cast<size_t>(column_bytes_) + first +
                                             lane_ / 4 * distance + lane_ % 4 * 16;
                    load_piece(own + i * kTile * 64, from);
                    load_piece(own + (i * kTile + 8) * 64, from + 8 * distance);
                }
            }
            if (!kIsFp8) load_scales(to + kBandBytes);
            ++next_;
            next_unit_ += kStepUnits;
            if (next_unit_ >= units_) ++band_, next_unit_ = 0;
        }
        copy_commit();
    }

    // Starts the loads of the words that have the scales and the zero points of the next step, of two columns of the
    // band in a lane. Interleaved scales are [block, column] in the ring, and a lane brings two columns' of each block.
    __device__ void load_scales(SharedAddress to) {
        const unsigned block = block_of(next_unit_), last = block_of(min(next_unit_ + kStepUnits, units_) - 1);
        if (interleaved_) {
            constexpr int kLanes = kTile / 2;  // that bring a tile's
            const int tile = band_ * kBandTiles + lane_ / kLanes;
            const char* from = static_cast<const char*>(matrix_of(tile).scales) + lane_ % kLanes * 4 +
                               (column_of(tile, 0) * blocks_ + block * kTile) * 2;
#pragma unroll
            for (unsigned i = 0; i < kStepUnits; ++i)
                if (tile < all_tiles() && block + i <= last)
                    copy_async_word(to + i * kBandColumns * 2 + lane_ * 4, from + i * kTile * 2);
            if (!has_zeros_) return;
        }
#pragma unroll
        for (int i = 0; i < kBandColumns / kWarp; ++i) {
            const int at = i * kWarp + lane_, tile = band_ * kBandTiles + at / kTile;
            if (tile >= all_tiles()) continue;
            const TangoMatrix& matrix = matrix_of(tile);
            const int column = column_of(tile, at % kTile);
            if (!interleaved_)
                load_words<kMaxScaleWords>(to + at * scale_words_ * 4,
                                           static_cast<const char*>(matrix.scales) + column * blocks_ * 2, block * 2,
                                           last * 2);
            if (has_zeros_)
                load_words<kZeroWords>(to + (kBandColumns * scale_words_ + at * kZeroWords) * 4,
                                       static_cast<const char*>(matrix.zeros) + column * zero_bytes(),
                                       block * kBits / 8, last * kBits / 8);
        }
    }

    // The words from that with a byte to that with another, counted from an address.
    template <int kMost>
    __device__ static void load_words(SharedAddress to, const char* from, unsigned begin, unsigned last) {
        from += begin;
        const unsigned skipped = reinterpret_cast<uintptr_t>(from) % 4, bytes = last - begin + skipped;
        from -= skipped;
        copy_async_word(to, from);
#pragma unroll
        for (unsigned i = 1; i < kMost; ++i)
            if (4 * i <= bytes) copy_async_word(to + 4 * i, from + 4 * i);
    }

    // Where a quarter of a column is in the ring's slot: swizzled, so that the columns that a warp reads at once are in
    // all banks.
    __device__ static int offset(int column, int quarter) {
        return column * 64 + (quarter ^ (kBits == 4 ? column >> 1 & 3 : column & 2)) * 16;
    }

    // Adds a step. What fills up the last one has inputs of zero.
    __device__ void multiply(Sums& sums, const char* slot, const BatchInput& input, int step) const {
        if (kIsFp8 || shift_ + (kBits == 8) > 1)
            multiply<kStepUnits>(sums, slot, input, step);
        else if (shift_ == 1)
            multiply<2>(sums, slot, input, step);
        else
            multiply<1>(sums, slot, input, step);
    }

    // The same with blocks of so many units in the step.
    template <int kUnits>
    __device__ void multiply(Sums& sums, const char* slot, const BatchInput& input, int step) const {
        const int column = lane_ / 4, part = lane_ % 4, first = step * kStepUnits;
        const Fragment* const fragments = input.fragments + 2 * first * kWarp + lane_;
        const float2* const unit_sums = reinterpret_cast<const float2*>(input.unit_sums) + first * 4 + part;
#pragma unroll
        for (int block = 0; block < kStepUnits / kUnits; ++block) {
            Products products = {};
#pragma unroll
            for (int j = block * kUnits; j < (block + 1) * kUnits; ++j) {
                const Fragment x = fragments[2 * j * kWarp], y = fragments[(2 * j + 1) * kWarp];
#pragma unroll
                for (int i = 0; i < kBandTiles; ++i) {
                    uint32_t low[4], high[4];
                    unpack(low, eight(slot + i * kTile * 64, column, j, part));
                    unpack(high, eight(slot + (i * kTile + 8) * 64, column, j, part));
                    mma(products.exact[i], {low[0], high[0], low[2], high[2]}, {x.x, x.y});
                    mma(products.rest[i], {low[0], high[0], low[2], high[2]}, {x.z, x.w});
                    mma(products.exact[i], {low[1], high[1], low[3], high[3]}, {y.x, y.y});
                    mma(products.rest[i], {low[1], high[1], low[3], high[3]}, {y.z, y.w});
                }
                if (kIsFp8) continue;
                products.inputs.x += unit_sums[4 * j].x;
                products.inputs.y += unit_sums[4 * j].y;
            }
            add_block(sums, products, slot + kBandBytes, first, block);
        }
    }

    // Adds the products of a block of the step that begins with unit `first`, less the zero point times the inputs, and
    // scaled. Scales and zero points are in the step's words. Tiles begin at multiples of 16 columns, so at a word; and
    // so the columns of a lane, 8 apart, have theirs at the same place of a word.
    __device__ void add_block(Sums& sums, const Products& products, const char* words, int first, int block) const {
        const unsigned column = lane_ / 4, first_block = block_of(first);
        block = min(block, (units_ - 1 - first) >> shift_);  // what fills up the step has no scale of its own
        float scales[2 * kBandTiles], zeros[2 * kBandTiles];
        const int distance = interleaved_ ? 2 : scale_words_ * 4;  // of two columns
        const char* const own_words =
            words + column * distance +
            (interleaved_ ? block * kBandColumns : (column * blocks_ + first_block) % 2 + block) * 2;
#pragma unroll
        for (int i = 0; i < 2 * kBandTiles; ++i) {
            zeros[i] = 1 << (kBits - 1);
            scales[i] = 1.0f;
            if (!kIsFp8) scales[i] = __half2float(*reinterpret_cast<const __half*>(own_words + 8 * i * distance));
        }
        if (!kIsFp8 && has_zeros_) read_zeros(zeros, words + kBandColumns * 4 * scale_words_, first_block, block);
#pragma unroll
        for (int i = 0; i < kBandTiles; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float sum = products.exact[i][j] + products.rest[i][j] / kLowScale;
                if (!kIsFp8) sum -= zeros[2 * i + j / 2] * (j % 2 == 0 ? products.inputs.x : products.inputs.y);
                sums.at[i][j] += scales[2 * i + j / 2] * sum;
            }
    }

    __device__ void read_zeros(float (&zeros)[2 * kBandTiles], const char* words, unsigned first_block,
                               unsigned block) const {
        const unsigned column = lane_ / 4;
        const unsigned bit =
            (column * zero_bytes() + first_block * kBits / 8) % 4 * 8 + first_block * kBits % 8 + block * kBits;
        const char* const own_words = words + (column * kZeroWords + bit / 32) * 4;
#pragma unroll
        for (int i = 0; i < 2 * kBandTiles; ++i) {
            const uint32_t word = *reinterpret_cast<const uint32_t*>(own_words + 8 * i * kZeroWords * 4);
            zeros[i] = word >> bit % 32 & ((1 << kBits) - 1);
        }
    }

    // Eight rows of a column in a slot: a lane's part of a unit.
    __device__ static Eight eight(const char* slot, int column, int unit, int part) {
        const int byte = unit * kUnitBytes + part * static_cast<int>(sizeof(Eight));
        return *reinterpret_cast<const Eight*>(slot + offset(column, byte / 16) + byte % 16);
    }

    __device__ static void unpack(uint32_t (&pairs)[4], Eight rows) {
        if constexpr (kIsFp8)
            unpack_fp8(pairs, rows);
        else
            Ints::unpack(pairs, rows);
    }

    // The warp that has a step: the last that begins no later.
    __device__ int warp_of(int step) const { return (min(kBatchWarps, steps_) * (step + 1) - 1) / steps_; }

    int lane_, warp_;  // of this thread
    char* ring_;       // of this warp
    float4* sums_;     // of all warps
    const TangoMatrix &first_, &second_;
    int shift_, blocks_, column_bytes_;     // of a whole column: blocks, each of 1 << shift_ units
    int scale_words_, step_bytes_, depth_;  // of the ring
    bool has_zeros_, interleaved_;
    int unit_, units_;             // of a column: the split's first, and their number
    int band_steps_, steps_;       // steps of a band, and of all bands
    int begin_, end_;              // this warp's steps
    int next_, band_, next_unit_;  // the next to be loaded, its band and its first unit
};

}  // namespace tango
