// The GEMV of matrices whose weights are blocks of 4 or 8 bits with a scale each, along the rows of one column.
#pragma once

#include "gemv.cuh"

namespace tango {

constexpr int kStages = 3;  // steps of a warp that are in flight: 48 KB of weights per SM
constexpr int kUnit = 32;   // rows that one pair of products takes, and the smallest block
constexpr int kTileColumns = 16;
constexpr int kScalesAt = kTileColumns * 64;                // in a step, behind its weights
constexpr int kZerosAt = kScalesAt + kTileColumns * 4 * 4;  // a word for each column and unit
constexpr int kStepBytes = kZerosAt + kTileColumns * 4 * 4;
constexpr int kBlockRingBytes = kStages * kWarps * kStepBytes;

// The input as the products take it, in the same memory: of eight rows i, a sixteenth of each in fp16, and 2048 times
// what that has lost. The order is that of unpack(). The last unit is filled up with zeros.
__device__ inline void split_input(float* input, int rows) {
#pragma unroll 1
    for (int i = kVector * threadIdx.x; i < ceil_div(rows, kUnit) * kUnit; i += kVector * kThreads) {
        __half2 high[kVector / 2], low[kVector / 2];
#pragma unroll
        for (int j = 0; j < kVector / 2; ++j) {
            const float a = i < rows ? input[i + j] / 16 : 0.0f, b = i < rows ? input[i + j + kVector / 2] / 16 : 0.0f;
            high[j] = __floats2half2_rn(a, b);
            const float2 rounded = __half22float2(high[j]);
            low[j] = __floats2half2_rn((a - rounded.x) * 2048, (b - rounded.y) * 2048);
        }
        uint4* const to = reinterpret_cast<uint4*>(input + i);
        to[0] = *reinterpret_cast<const uint4*>(high);
        to[1] = *reinterpret_cast<const uint4*>(low);
    }
    sync_threads();
}

// A warp multiplies tiles of 16 columns with tensor cores, whose other operand is the input: the columns of it that are
// even have its fp16, the odd ones the rest, so that nothing is lost of fp32. A step is a tile's next 64 bytes of each
// column. The steps of all tiles are one sequence, of which each warp has an equal share; where a warp begins or ends
// inside of a tile, the sums of several warps are added. All of a warp's loads go through its ring in shared memory.
template <int kBits>
class BlockGemv : public GemvPart {
  public:
    __device__ BlockGemv(const GemvPart& part, uint4* ring, const TangoMatrix& first, const TangoMatrix& second)
        : GemvPart(part),
          ring_(reinterpret_cast<char*>(ring) + warp_id() * kStages * kStepBytes),
          first_(first),
          second_(second) {
        seek();
    }

    __device__ void start() {
#pragma unroll
        for (int i = 0; i < kStages; ++i) load(i);
    }

    __device__ void skip_started() {
        next_ = min(begin_ + kStages, end_);
        place_ = place(next_);
    }

    // As RowGemv::run(), but that the input is overwritten.
    template <typename Emit>
    __device__ void run(const float* input, float* acc, Emit emit) {
        if (!is_valid()) {  // nothing to do for this block
            copy_wait<0>();
            sync_threads();
            return;
        }
        split_input(const_cast<float*>(input), rows_);
#pragma unroll 1
        while (true) {
            accumulate(reinterpret_cast<const uint4*>(input), acc);
            const int columns = tiles() * kTileColumns, second = partition_.matrices == 2 ? columns : 0;
#pragma unroll 1
            for (int c = threadIdx.x; c < columns; c += kThreads)
                emit(column_ + c, split_, total(acc, c), total(acc, c + second));
            index_ += gridDim.x;
            if (!is_valid()) return;
            select();
            seek();
            start();
            sync_threads();
        }
    }

  private:
    static constexpr int kUnitBytes = kUnit * kBits / 8;
    static constexpr int kStepUnits = 64 / kUnitBytes;

    // A place in the sequence of steps: a tile, of the first matrix's and then the second's, and a step of it.
    struct Place {
        int tile, step;
    };

    // Of the block's part: tiles of a matrix, units of a column, steps of a tile, and of all tiles.
    __device__ int tiles() const { return min(partition_.tile_n, partition_.columns - column_) / kTileColumns; }
    __device__ int units() const { return ceil_div(rows_, kUnit); }
    __device__ int tile_steps() const { return ceil_div(units(), kStepUnits); }
    __device__ int steps() const { return is_valid() ? partition_.matrices * tiles() * tile_steps() : 0; }

    __device__ Place place(int step) const {
        const int steps = max(1, tile_steps()), tile = step / steps;
        return {tile, step - tile * steps};
    }

    // Finds this warp's steps.
    __device__ void seek() {
        const int all = steps(), sharers = max(1, min(kWarps, all));
        begin_ = min(warp_id(), sharers) * all / sharers;
        end_ = min(warp_id() + 1, sharers) * all / sharers;
        next_ = begin_;
        place_ = place(begin_);
    }

    // Of the whole matrix: units and blocks of a column, where a block has 1 << shift() units.
    __device__ int shift() const { return first_.group >> 6; }
    __device__ int blocks() const { return (partition_.rows + first_.group - 1) >> (5 + shift()); }
    __device__ int zero_bytes() const { return (blocks() * kBits + 7) / 8; }

    // Starts the loads of the next step, if there is one. A lane brings a quarter of the bytes of two columns that are
    // 8 apart, and the words that hold the scale and the zero point of one of the step's units for both.
    __device__ void load(int slot) {
        if (next_ < end_) {
            const bool second = place_.tile >= tiles();
            const TangoMatrix& matrix = second ? second_ : first_;
            const int column = column_ + (second ? place_.tile - tiles() : place_.tile) * kTileColumns + lane_id() / 4;
            const int quarter = lane_id() % 4, unit = row_ / kUnit + place_.step * kStepUnits;  // the step's first
            const SharedAddress to = shared_address(ring_ + slot * kStepBytes);
            const size_t row_bytes = static_cast<size_t>(blocks() << shift()) * kUnitBytes;
            const char* values = static_cast<const char*>(matrix.values) + column * row_bytes;
            values += unit * kUnitBytes + quarter * 16;
            if ((place_.step * 4 + quarter) * 16 < units() * kUnitBytes) {
                copy_async(to + offset(lane_id() / 4, quarter), values);
                copy_async(to + offset(lane_id() / 4 + 8, quarter), values + 8 * row_bytes);
            }
            if (quarter < kStepUnits && place_.step * kStepUnits + quarter < units()) {
                const int block = (unit + quarter) >> shift();
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int word = ((lane_id() / 4 + 8 * i) * 4 + quarter) * 4;
                    const int scale = ((column + 8 * i) * blocks() + block) * 2;
                    copy_async_word(to + kScalesAt + word, static_cast<const char*>(matrix.scales) + (scale & ~3));
                    if (first_.zeros == nullptr) continue;
                    const int zero = (column + 8 * i) * zero_bytes() + block * kBits / 8;
                    copy_async_word(to + kZerosAt + word, static_cast<const char*>(matrix.zeros) + (zero & ~3));
                }
            }
            ++next_;
            if (++place_.step == tile_steps()) ++place_.tile, place_.step = 0;
        }
        copy_commit();
    }

    // Where a quarter of a column is in the ring's slot: swizzled, so that eight columns are in all banks.
    __device__ static int offset(int column, int quarter) { return column * 64 + (quarter ^ (column >> 1 & 3)) * 16; }

    // Adds this warp's steps, with kStages in flight all the time, and stores the sums of each tile.
    __device__ void accumulate(const uint4* input, float* acc) {
        float sum[2] = {};
        Place at = place(begin_);
#pragma unroll 1
        for (int step = begin_, slot = 0; step < end_; ++step, slot = slot + 1 < kStages ? slot + 1 : 0) {
            copy_wait<kStages - 1>();
            __syncwarp();
            multiply(sum, ring_ + slot * kStepBytes, input, at.step);
            __syncwarp();
            load(slot);
            if (++at.step < tile_steps() && step + 1 < end_) continue;
            store(sum, acc, at.tile);
            ++at.tile, at.step = 0;
        }
        copy_wait<0>();
        sync_threads();
    }

    // Adds a step: for each unit two products, whose result is scaled.
    __device__ void multiply(float (&sum)[2], const char* slot, const uint4* input, int step) const {
        const int column = lane_id() / 4, part = lane_id() % 4, units = this->units();
#pragma unroll
        for (int j = 0; j < kStepUnits; ++j) {
            const int unit = step * kStepUnits + j;
            if (unit >= units) break;
            const Scaling scaling(*this, slot + (column * 4 + j) * 4, (row_ / kUnit + unit) >> shift());
            uint32_t low[4], high[4];
            unpack(low, word(slot, column, j, part), ZeroPoint(scaling.zeros[0]));
            unpack(high, word(slot, column + 8, j, part), ZeroPoint(scaling.zeros[1]));
            const uint4 x = input[(unit * 4 + part) * 2 + column % 2];
            float c[4] = {};
            mma(c, {low[0], high[0], low[1], high[1]}, {x.x, x.y});
            mma(c, {low[2], high[2], low[3], high[3]}, {x.z, x.w});
            sum[0] += scaling.scales[0] * (c[0] + c[1] / 2048);
            sum[1] += scaling.scales[1] * (c[2] + c[3] / 2048);
        }
    }

    // Scales and zero points of a block of two columns that are 8 apart, from the words that hold them. Tiles begin at
    // multiples of 16 columns, so at a word; and so both are at the same place of theirs.
    struct Scaling {
        __device__ Scaling(const BlockGemv& gemv, const char* words, int block) {
            const int column = lane_id() / 4;
            const int half = (column * gemv.blocks() + block) % 2, bit = block * kBits;
            const int shift = (column * gemv.zero_bytes() + bit / 8) % 4 * 8 + bit % 8;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const char* const own = words + 8 * i * 4 * 4;
                scales[i] = __half2float(reinterpret_cast<const __half*>(own + kScalesAt)[half]);
                zeros[i] = 1 << (kBits - 1);
                if (gemv.first_.zeros == nullptr) continue;
                zeros[i] = *reinterpret_cast<const uint32_t*>(own + kZerosAt) >> shift & ((1 << kBits) - 1);
            }
        }

        float scales[2];
        uint32_t zeros[2];
    };

    // Eight rows of a column in a slot: a lane's part of a unit.
    __device__ static auto word(const char* slot, int column, int unit, int part) {
        if constexpr (kBits == 4) {
            return *reinterpret_cast<const uint32_t*>(slot + offset(column, unit) + part * 4);
        } else {
            return *reinterpret_cast<const uint2*>(slot + offset(column, 2 * unit + part / 2) + part % 2 * 8);
        }
    }

    // A warp and a tile of its have a place of their own: the next warp's tiles begin where this one's end.
    __device__ static void store(float (&sum)[2], float* acc, int tile) {
        const int column = lane_id() / 4, part = lane_id() % 4;
        if (part < 2) acc[(warp_id() + tile) * kTileColumns + column + 8 * part] = 16 * (part == 0 ? sum[0] : sum[1]);
        sum[0] = sum[1] = 0.0f;
    }

    // The sum of a column over the warps that had steps of its tile.
    __device__ float total(const float* acc, int column) const {
        const int tile = column / kTileColumns, all = steps();
        const int last = warp_of((tile + 1) * tile_steps() - 1, all);
        float sum = 0.0f;
        for (int warp = warp_of(tile * tile_steps(), all); warp <= last; ++warp)
            sum += acc[warp * kTileColumns + column];
        return sum;
    }

    // The warp that has a step: the last that begins no later.
    __device__ static int warp_of(int step, int all) { return (min(kWarps, all) * (step + 1) - 1) / all; }

    char* ring_;
    const TangoMatrix &first_, &second_;
    int begin_, end_, next_;  // this warp's steps, and the next to be loaded
    Place place_;             // of that
};

}  // namespace tango
