// Matrices that lie by columns, for products of several vectors.
#pragma once

#include "batch_gemv.cuh"
#include "block_gemv.cuh"

namespace tango {

constexpr int kBatchStages = 3;                                     // steps of a warp that are in flight
constexpr int kUnitScalesAt = kTileColumns * 64;                    // in a step, behind its weights: a word for each
constexpr int kUnitZerosAt = kUnitScalesAt + kTileColumns * 4 * 4;  // column and unit
constexpr int kStepBytes = kUnitZerosAt + kTileColumns * 4 * 4;

// The weights of matrices by columns, FP8 or blocks along the rows with a scale each (kWeights is of TangoWeights), in
// steps: a tile's next 64 bytes of each column. The steps of all tiles are one sequence, of which each warp has an
// equal share; where a warp begins or ends inside of a tile, the sums of several warps are added. All of a warp's loads
// go through its ring in shared memory. What is multiplied is exact, and the result is scaled.
template <int kWeights>
class BatchColumns : public BatchPart {
  public:
    __device__ BatchColumns(const BatchPart& part, char* ring, int, const TangoMatrix& first, const TangoMatrix& second)
        : BatchPart(part),
          ring_(ring + warp_id() * kBatchStages * kStepBytes),
          sums_(reinterpret_cast<float4*>(ring + kWarps * kBatchStages * kStepBytes)),
          first_(first),
          second_(second) {
        seek();
    }

    // Starts the first loads of the block's part.
    __device__ void start() {
#pragma unroll 1
        for (int i = 0; i < kBatchStages; ++i) load(i);
    }

    // To be called where another object has started them.
    __device__ void skip_started() {
        next_ = min(begin_ + kBatchStages, end_);
        place_ = place(next_);
    }

  protected:
    static constexpr int kDistance = 8;  // of a lane's two columns

    // Finds this warp's steps.
    __device__ void seek() {
        units_ = ceil_div(rows_, kUnit);
        tile_steps_ = max(1, ceil_div(units_, kStepUnits));
        steps_ = is_valid() ? partition_.matrices * tiles_ * tile_steps_ : 0;
        const int sharers = max(1, min(kWarps, steps_));
        begin_ = min(warp_id(), sharers) * steps_ / sharers;
        end_ = min(warp_id() + 1, sharers) * steps_ / sharers;
        next_ = begin_;
        place_ = place(begin_);
    }

    // Adds this warp's steps, with kBatchStages in flight all the time, and stores the sums of each tile.
    __device__ void accumulate(const Fragment* input) {
        float sum[4] = {};
        Place at = place(begin_);
#pragma unroll 1
        for (int step = begin_, slot = 0; step < end_; ++step, slot = slot + 1 < kBatchStages ? slot + 1 : 0) {
            copy_wait<kBatchStages - 1>();
            __syncwarp();
            multiply(sum, ring_ + slot * kStepBytes, input, at.step);
            __syncwarp();
            load(slot);
            if (++at.step < tile_steps_ && step + 1 < end_) continue;
            // A warp and a tile of its have a place of their own: the next warp's tiles begin where this one's end.
            sums_[(warp_id() + at.tile) * kWarp + lane_id()] = make_float4(sum[0], sum[1], sum[2], sum[3]);
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] = 0.0f;
            ++at.tile, at.step = 0;
        }
        copy_wait<0>();
        sync_threads();
    }

    // The results of a tile in a lane, of the first matrix or the second: two columns of two sequences.
    __device__ float4 total(int matrix, int tile, int lane) const {
        const int index = matrix * tiles_ + tile, last = warp_of((index + 1) * tile_steps_ - 1);
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int warp = warp_of(index * tile_steps_); warp <= last; ++warp)
            sum = sum + sums_[(warp + index) * kWarp + lane];
        const float scale = kInputScale * (kIsFp8 ? fp8_scale(matrix == 0 ? first_ : second_) : 1.0f / kSubnormal);
        return make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale);
    }

    // The first of a lane's two columns of a tile.
    __device__ static int column(int lane) { return lane / 4; }

  private:
    static constexpr bool kIsFp8 = kWeights == TANGO_WEIGHTS_FP8;
    static constexpr int kBits = kWeights == TANGO_WEIGHTS_BLOCKS_4 ? 4 : 8;
    using Ints = PackedInts<kBits>;
    using Eight = typename Ints::Eight;
    static constexpr int kUnitBytes = kUnit * kBits / 8;
    static constexpr int kStepUnits = 64 / kUnitBytes;
    static_assert(kWarps * kBatchStages * kStepBytes + (kWarps + kMaxTiles) * kTileBytes <= kBatchRingBytes,
                  "rings and sums do not fit");

    // A place in the sequence of steps: a tile, of the first matrix's and then the second's, and a step of it.
    struct Place {
        int tile, step;
    };

    __device__ Place place(int step) const {
        const int tile = step / tile_steps_;
        return {tile, step - tile * tile_steps_};
    }

    // Of the whole matrix: blocks of a column, where a block has 1 << shift() units.
    __device__ int shift() const { return first_.group >> 6; }
    __device__ int blocks() const { return (partition_.rows + first_.group - 1) >> (5 + shift()); }
    __device__ int zero_bytes() const { return (blocks() * kBits + 7) / 8; }

    // Starts the loads of the next step, if there is one. A lane brings a quarter of the bytes of two columns that are
    // 8 apart, and the words that hold the scale and the zero point of one of the step's units for both.
    __device__ void load(int slot) {
        if (next_ < end_) {
            const bool second = place_.tile >= tiles_;
            const TangoMatrix& matrix = second ? second_ : first_;
            const int column = column_ + (second ? place_.tile - tiles_ : place_.tile) * kTile + lane_id() / 4;
            const int quarter = lane_id() % 4, unit = row_ / kUnit + place_.step * kStepUnits;  // the step's first
            const SharedAddress to = shared_address(ring_ + slot * kStepBytes);
            const size_t column_bytes = kIsFp8 ? partition_.rows : (blocks() << shift()) * kUnitBytes;
            const char* values = static_cast<const char*>(matrix.values) + column * column_bytes;
            values += unit * kUnitBytes + quarter * 16;
            // The last 16 of FP8's rows may be half of a unit. Whatever the other half is, its input is zero.
            if ((place_.step * 4 + quarter) * 16 < (kIsFp8 ? rows_ : units_ * kUnitBytes)) {
                copy_async(to + offset(lane_id() / 4, quarter), values);
                copy_async(to + offset(lane_id() / 4 + 8, quarter), values + 8 * column_bytes);
            }
            if (!kIsFp8 && quarter < kStepUnits && place_.step * kStepUnits + quarter < units_) {
                const int block = (unit + quarter) >> shift();
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int word = ((lane_id() / 4 + 8 * i) * 4 + quarter) * 4;
                    const int scale = ((column + 8 * i) * blocks() + block) * 2;
                    copy_async_word(to + kUnitScalesAt + word, static_cast<const char*>(matrix.scales) + (scale & ~3));
                    if (first_.zeros == nullptr) continue;
                    const int zero = (column + 8 * i) * zero_bytes() + block * kBits / 8;
                    copy_async_word(to + kUnitZerosAt + word, static_cast<const char*>(matrix.zeros) + (zero & ~3));
                }
            }
            ++next_;
            if (++place_.step == tile_steps_) ++place_.tile, place_.step = 0;
        }
        copy_commit();
    }

    // Where a quarter of a column is in the ring's slot: swizzled, so that eight columns are in all banks.
    __device__ static int offset(int column, int quarter) { return column * 64 + (quarter ^ (column >> 1 & 3)) * 16; }

    // Adds a step: for each unit the products of two fragments, whose result is scaled.
    __device__ void multiply(float (&sum)[4], const char* slot, const Fragment* input, int step) const {
        const int column = lane_id() / 4, part = lane_id() % 4;
#pragma unroll
        for (int j = 0; j < kStepUnits; ++j) {
            const int unit = step * kStepUnits + j;
            if (unit >= units_) break;
            const Scaling scaling(*this, slot + (column * 4 + j) * 4, (row_ / kUnit + unit) >> shift());
            uint32_t low[4], high[4];
            unpack(low, eight(slot, column, j, part), scaling.zeros[0]);
            unpack(high, eight(slot, column + 8, j, part), scaling.zeros[1]);
            float exact[4] = {}, rest[4] = {};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const Fragment x = input[(2 * unit + i) * kWarp + lane_id()];
                const uint32_t weights[4] = {low[i], high[i], low[i + 2], high[i + 2]};
                mma(exact, weights, {x.x, x.y});
                mma(rest, weights, {x.z, x.w});
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] += scaling.scales[i / 2] * (exact[i] + rest[i] / kLowScale);
        }
    }

    // Scales and zero points of a block of two columns that are 8 apart, from the words that hold them. Tiles begin at
    // multiples of 16 columns, so at a word; and so both are at the same place of theirs. FP8 has none in a step.
    struct Scaling {
        __device__ Scaling(const BatchColumns& own, const char* words, int block) {
            if (kIsFp8) return;
            const int column = lane_id() / 4;
            const int half = (column * own.blocks() + block) % 2, bit = block * kBits;
            const int shift = (column * own.zero_bytes() + bit / 8) % 4 * 8 + bit % 8;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const char* const at = words + 8 * i * 4 * 4;
                scales[i] = __half2float(reinterpret_cast<const __half*>(at + kUnitScalesAt)[half]);
                zeros[i] = 1 << (kBits - 1);
                if (own.first_.zeros == nullptr) continue;
                zeros[i] = *reinterpret_cast<const uint32_t*>(at + kUnitZerosAt) >> shift & ((1 << kBits) - 1);
            }
        }

        float scales[2] = {1.0f, 1.0f};
        uint32_t zeros[2];
    };

    // Eight rows of a column in a slot: a lane's part of a unit.
    __device__ static Eight eight(const char* slot, int column, int unit, int part) {
        const int byte = unit * kUnitBytes + part * static_cast<int>(sizeof(Eight));
        return *reinterpret_cast<const Eight*>(slot + offset(column, byte / 16) + byte % 16);
    }

    // They as pairs, less their zero point, which as a negative subnormal number has its own bits and a sign.
    __device__ static void unpack(uint32_t (&pairs)[4], Eight rows, uint32_t zero) {
        if constexpr (kIsFp8) {
            unpack_fp8(pairs, rows);
        } else {
            Ints::unpack(pairs, rows);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                pairs[i] = add2(pairs[i], 0x80008000u + zero * (i < 2 ? 0x10001u : 0x10001u * Ints::kOdd));
        }
    }

    // The warp that has a step: the last that begins no later.
    __device__ int warp_of(int step) const { return (min(kWarps, steps_) * (step + 1) - 1) / steps_; }

    char* ring_;
    float4* sums_;  // of all warps
    const TangoMatrix &first_, &second_;
    int units_, tile_steps_, steps_;  // units of a column, steps of a tile, and of all tiles
    int begin_, end_, next_;          // this warp's steps, and the next to be loaded
    Place place_;                     // of that
};

}  // namespace tango
