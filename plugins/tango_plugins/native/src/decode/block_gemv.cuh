// The GEMV of matrices whose weights are blocks of 4 or 8 bits with a scale each, along the rows of one column.
#pragma once

#include "gemv.cuh"
#include "linear/blocks.cuh"
#include "registers.cuh"

namespace tango {

constexpr int kUnit = 32;  // rows of the smallest block
constexpr int kTileColumns = kTileOutputs;
constexpr int kMaxBlockTiles = kMaxVectors * kVector / kTileColumns;
constexpr int kDeep = 4, kMedium = 3, kShallow = 2;       // steps of a warp that are in flight; at least one
constexpr int kAhead = 1;                                 // those that are loaded before the input is there
constexpr int kScalesAt = kTileColumns * kPieceBytes;     // in a stage, after its weights
constexpr int kZerosAt = kScalesAt + 2 * kWarp * 4;       // two words for each lane
constexpr int kMaxStageBytes = kZerosAt + 2 * kWarp * 4;  // without zero points, a stage ends before them

// How many steps fit into a ring.
__host__ __device__ constexpr int ring_depth(int bytes, int stage_bytes) {
    const int fit = bytes / (kWarps * stage_bytes);
    return fit >= kDeep ? kDeep : fit >= kMedium ? kMedium : fit >= kShallow ? kShallow : 1;
}

// A vector is what a lane multiplies of a column at once: 16 bytes.
template <int kBits>
constexpr int kVectorRows = 128 / kBits;

// A vector's input: of each row a sixteenth in fp16, then 2048 times what that has lost, and the sum of all. Four more
// bytes than the sum takes bring the vectors that a warp reads at once into different banks.
template <int kBits>
constexpr int kVectorInputs = kVectorRows<kBits> + 4;                // floats
constexpr int kMaxInputs = kVectorInputs<8> * 128 / kVectorRows<8>;  // of 128 rows, the most

// Turns the input into that of the vectors of whole steps, in place. Zeros fill up the last step. The order of eight
// rows is that of unpack().
template <int kBits>
__device__ void split_input(float* input, int rows) {
    constexpr int kDistance = PackedInts<kBits>::kDistance;
    constexpr int kRows = kVectorRows<kBits>, kParts = kRows / kVector, kStepParts = 4 * kParts;
    const int parts = ceil_div(rows, kVector * kStepParts) * kStepParts;
#pragma unroll 1
    for (int first = (parts - 1) / kThreads * kThreads; first >= 0; first -= kThreads) {  // from the end: it grows
        const int part = first + threadIdx.x, row = part * kVector;
        const float4* const from = reinterpret_cast<const float4*>(input + row);
        const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f), a = row < rows ? from[0] : zero,
                     b = row < rows ? from[1] : zero;
        const float x[kVector] = {a.x / 16, a.y / 16, a.z / 16, a.w / 16, b.x / 16, b.y / 16, b.z / 16, b.w / 16};
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum += x[i];
#pragma unroll
        for (int offset = 1; offset < kParts; offset *= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
        sync_threads();
        if (part >= parts) continue;
        __half2 high[kVector / 2], low[kVector / 2];
#pragma unroll
        for (int i = 0; i < kVector / 2; ++i) {
            const float a = x[i % 2 * (kVector / kDistance) + i / 2];
            const float b = x[i % 2 * (kVector / kDistance) + i / 2 + kDistance];
            high[i] = __floats2half2_rn(a, b);
            const float2 rounded = __half22float2(high[i]);
            low[i] = __floats2half2_rn((a - rounded.x) * 2048, (b - rounded.y) * 2048);
        }
        float* const vector = input + part / kParts * kVectorInputs<kBits>;
        uint4* const to = reinterpret_cast<uint4*>(vector) + part % kParts;
        to[0] = *reinterpret_cast<const uint4*>(high);
        to[kParts] = *reinterpret_cast<const uint4*>(low);
        if (part % kParts == 0) vector[kRows] = sum * kSubnormal;
    }
    sync_threads();
}

// A warp multiplies tiles of 16 columns with tensor cores. A step is a tile's next 64 bytes of each column: a vector
// for each lane of a quad, and of two columns that are 8 apart. The columns of the tensor cores' other operand belong
// to the lanes of a quad, two to each: one has fp16 of the input of that lane's vectors, the other the rest, so that
// nothing is lost of fp32, and zeros in place of the other lanes' rows. So a lane gets the products of its own vectors,
// each of which is in one block. It scales and adds them.
//
// The steps of all tiles are one sequence, of which each warp has an equal share; where a warp begins or ends inside of
// a tile, the sums of several warps are added. What a lane reads it has loaded itself, through a ring in shared memory.
template <int kBits>
class BlockGemv : public GemvPart {
  public:
    __device__ BlockGemv(const GemvPart& part, const Ring& ring, const TangoMatrix& first, const TangoMatrix& second)
        : GemvPart(part),
          first_(first),
          second_(second),
          stage_bytes_(first.zeros == nullptr ? kZerosAt : kMaxStageBytes),
          places_(places_of(first, partition_.rows, kTileColumns)),
          shift_((first.group >> 6) + (kBits == 8)),
          tile_steps_(ceil_div(rows_, 4 * kRows)),
          last_((row_ + rows_ - 1) / kRows) {
        depth_ = has_zeros() ? ring_depth(ring.bytes, kMaxStageBytes) : ring_depth(ring.bytes, kZerosAt);
        char* const own = reinterpret_cast<char*>(ring.memory) + warp_id() * depth_ * stage_bytes_;
        values_in_ring_ = own + lane_id() * 16;
        words_in_ring_ = own + kScalesAt + lane_id() * 4;
        seek();
    }

    __device__ void start() { start(0, ahead()); }

    __device__ void skip_started() { open(min(begin_ + ahead(), end_)); }

    // As RowGemv::run(), but that the input is overwritten.
    template <typename Emit>
    __device__ void run(const float* input, float* acc, Emit emit) {
        if (!is_valid()) {  // nothing to do for this block
            copy_wait<0>();
            sync_threads();
            return;
        }
        start(ahead(), depth_);
        split_input<kBits>(const_cast<float*>(input), rows_);
#pragma unroll 1
        while (true) {
            accumulate(input, acc);
            const int columns = tiles() * kTileColumns, second = partition_.matrices == 2 ? columns : 0;
#pragma unroll 1
            for (int c = threadIdx.x; c < columns; c += kThreads)
                emit(column_ + c, split_, total(acc, c), second > 0 ? total(acc, c + second) : 0.0f);
            index_ += gridDim.x;
            if (!is_valid()) return;
            select();
            seek();
            start(0, depth_);
            sync_threads();
        }
    }

  private:
    static constexpr int kRows = kVectorRows<kBits>;
    using Ints = PackedInts<kBits>;

    // Tiles of the block's part of a matrix, and steps of all.
    __device__ int tiles() const { return min(partition_.tile_n, partition_.columns - column_) / kTileColumns; }
    __device__ int steps() const { return is_valid() ? partition_.matrices * tiles() * tile_steps_ : 0; }

    // Steps to load before the input is there: all, where that is all that there is to load. Else loads would delay the
    // few reads that all blocks wait for.
    __device__ int ahead() const { return end_ - begin_ > depth_ ? min(kAhead, depth_) : depth_; }

    // Starts the loads of some steps of a full ring.
    __device__ void start(int first, int last) {
#pragma unroll 1
        for (int i = first; i < last; ++i) load(i * stage_bytes_);
    }

    // Finds this warp's steps.
    __device__ void seek() {
        const int all = steps();
        begin_ = all < kWarps ? min(warp_id(), all) : warp_id() * all / kWarps;
        end_ = all < kWarps ? min(warp_id() + 1, all) : (warp_id() + 1) * all / kWarps;
        open(begin_);
    }

    // Makes a step the next to be loaded.
    __device__ void open(int step) {
        next_ = step;
        tile_ = quotient(step, max(1, tile_steps_));
        open_tile();
        const int skipped = step - tile_ * tile_steps_;
        left_ -= skipped;
        vector_ += 4 * skipped;
    }

    // Begins to load a tile; the second matrix's tiles follow the first's.
    __device__ void open_tile() {
        const bool second = tile_ >= tiles();
        const TangoMatrix& matrix = second ? second_ : first_;
        const size_t column = column_ + (second ? tile_ - tiles() : tile_) * kTileColumns;
        values_ = static_cast<const char*>(matrix.values) + column * places_.row_bytes + lane_id() / 4 * column_bytes();
        scales_ = static_cast<const char*>(matrix.scales) + column * places_.blocks * 2;
        zeros_ = static_cast<const char*>(matrix.zeros) + column * zero_bytes();
        left_ = tile_steps_;
        vector_ = first_vector();
    }

    // Bytes from a column to the next, and where a vector is in one.
    __device__ int column_bytes() const { return places_.interleaved ? kPieceBytes : places_.row_bytes; }
    __device__ unsigned value(unsigned vector) const {
        constexpr unsigned kVectors = kPieceBytes / 16;
        return places_.interleaved ? vector / kVectors * kPieceBytes * kTileColumns + vector % kVectors * 16
                                   : vector * 16;
    }

    // Bytes of a column's zero points.
    __device__ int zero_bytes() const { return (places_.blocks * kBits + 7) / 8; }

    // The lane's vector of a column that is in the first step.
    __device__ unsigned first_vector() const { return row_ / kRows + lane_id() % 4; }

    // The scale and the zero point of a lane's vector, as numbers of 16 and kBits bits from the tile's first. Tiles
    // begin at words, and the column that is 8 farther has them at the same place of a word.
    __device__ unsigned block(unsigned vector) const { return min(vector, last_) >> shift_; }
    __device__ unsigned scale(unsigned vector) const {
        const unsigned column = lane_id() / 4;
        return places_.interleaved ? block(vector) * kTileColumns + column : column * places_.blocks + block(vector);
    }
    __device__ unsigned zero(unsigned vector) const {
        return lane_id() / 4 * zero_bytes() * (8 / kBits) + block(vector);
    }

    // Starts the loads of the next step, if there is one. A lane that has no vector in it reads its last scale again.
    __device__ void load(int stage) {
        if (next_ < end_) {
            if (vector_ <= last_) {
                const SharedAddress to = shared_address(values_in_ring_ + stage);
                const char* const from = values_ + value(vector_);
                copy_async_prefetch(to, from);
                copy_async_prefetch(to + kWarp * 16, from + 8 * column_bytes());
            }
            const SharedAddress to = shared_address(words_in_ring_ + stage);
            load_words(to, scales_ + scale(vector_) / 2 * 4, 16 * (places_.interleaved ? 1 : places_.blocks));
            if (has_zeros())
                load_words(to + kZerosAt - kScalesAt, zeros_ + zero(vector_) * kBits / 32 * 4, 8 * zero_bytes());
            ++next_;
            vector_ += 4;
            if (--left_ == 0) {
                ++tile_;
                open_tile();
            }
        }
        copy_commit();
    }

    __device__ static void load_words(SharedAddress to, const char* from, int distance) {
        copy_async_word(to, from);
        copy_async_word(to + kWarp * 4, from + distance);
    }

    __device__ bool has_zeros() const { return stage_bytes_ == kMaxStageBytes; }

    // Waits for the oldest of the steps in flight.
    __device__ void wait() const {
        if (depth_ == kDeep)
            copy_wait<kDeep - 1>();
        else if (depth_ == kMedium)
            copy_wait<kMedium - 1>();
        else if (depth_ == kShallow)
            copy_wait<kShallow - 1>();
        else
            copy_wait<0>();
    }

    // Adds this warp's steps, with depth_ in flight all the time, and stores the sums of each tile.
    __device__ void accumulate(const float* input, float* acc) {
        uint4 x[kRows / kVector] = {};
        int tile = quotient(begin_, max(1, tile_steps_)), first = begin_ - tile * tile_steps_, stage = 0;
#pragma unroll 1
        for (int step = begin_; step < end_; ++tile, first = 0) {
            float sum[2] = {};
            const int end = min(end_, (tile + 1) * tile_steps_);
            const float* from = input + (4 * first + lane_id() % 4) * kVectorInputs<kBits>;
            unsigned vector = first_vector() + 4 * first;
#pragma unroll 1
            for (; step < end; ++step) {
                wait();
                multiply(sum, x, from, stage, vector);
                load(stage);
                vector += 4;
                from += 4 * kVectorInputs<kBits>;
                stage += stage_bytes_;
                if (stage == depth_ * stage_bytes_) stage = 0;
            }
            store(sum, acc, tile);
            if (lane_id() == 0 && first == 0) warps(acc, tile)[0] = warp_id();
            if (lane_id() == 0 && step == (tile + 1) * tile_steps_) warps(acc, tile)[1] = warp_id();
        }
        copy_wait<0>();
        sync_threads();
    }

    // Adds a step: of two columns, a lane's vectors times its input. x is zero in all lanes but the two of each column
    // of the tensor cores' other operand that belongs to their vectors.
    __device__ void multiply(float (&sum)[2], uint4 (&x)[kRows / kVector], const float* input, int stage,
                             unsigned vector) const {
        const int column = local_lane() / 4;
        if (column / 2 == lane_id() % 4)
#pragma unroll
            for (int i = 0; i < kRows / kVector; ++i)
                x[i] = reinterpret_cast<const uint4*>(input + column % 2 * (kRows / 2))[i];
        const uint4* const values = reinterpret_cast<const uint4*>(values_in_ring_ + stage);
        const uint4 weights[2] = {values[0], values[kWarp]};
        float even[4] = {}, odd[4] = {};
#pragma unroll
        for (int i = 0; i < kRows / kVector; ++i) {
            uint32_t low[4], high[4];
            Ints::unpack(low, Ints::eight(weights[0], i));
            Ints::unpack(high, Ints::eight(weights[1], i));
            mma(even, {low[0], high[0], low[1], high[1]}, {x[i].x, x[i].y});
            mma(odd, {low[2], high[2], low[3], high[3]}, {x[i].z, x[i].w});
        }
        const uint32_t* const words = reinterpret_cast<const uint32_t*>(words_in_ring_ + stage);
        const __half* const scales = reinterpret_cast<const __half*>(words) + scale(vector) % 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float zero = 1 << (kBits - 1);
            if (has_zeros()) {
                const uint32_t word = words[(kZerosAt - kScalesAt) / 4 + i * kWarp];
                zero = word >> this->zero(vector) % (32 / kBits) * kBits & ((1 << kBits) - 1);
            }
            const float rounded = even[2 * i] + odd[2 * i] / Ints::kOdd;
            const float rest = even[2 * i + 1] + odd[2 * i + 1] / Ints::kOdd;
            sum[i] += __half2float(scales[i * 2 * kWarp]) * (rounded + rest / 2048 - zero * input[kRows]);
        }
    }

    // Adds the lanes of a quad. A warp and a tile of its have a place of their own: the next warp's tiles begin where
    // this one's end.
    __device__ static void store(float (&sum)[2], float* acc, int tile) {
#pragma unroll
        for (int offset = 1; offset <= 2; offset *= 2)
#pragma unroll
            for (int i = 0; i < 2; ++i) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], offset);
        const int column = lane_id() / 4, part = lane_id() % 4;
        if (part < 2)
            acc[(warp_id() + tile) * kTileColumns + column + 8 * part] =
                (part == 0 ? sum[0] : sum[1]) * (16 / kSubnormal);
    }

    // The sum of a column over the warps that had steps of its tile.
    __device__ static float total(float* acc, int column) {
        const int* const range = warps(acc, column / kTileColumns);
        float sum = 0.0f;
#pragma unroll 1
        for (int warp = range[0]; warp <= range[1]; ++warp) sum += acc[warp * kTileColumns + column];
        return sum;
    }

    // The first and the last warp that have steps of a tile.
    __device__ static int* warps(float* acc, int tile) {
        return reinterpret_cast<int*>(acc) + (kWarps + kMaxBlockTiles) * kTileColumns + 2 * tile;
    }

    const TangoMatrix &first_, &second_;
    int stage_bytes_, depth_;
    char *values_in_ring_, *words_in_ring_;  // this lane's in the first stage
    BlockPlaces places_;
    int shift_;  // a block has 1 << shift_ vectors
    int tile_steps_;
    unsigned last_;                          // vector of a column that the block has
    int begin_, end_;                        // this warp's steps
    int next_, tile_, left_;                 // the next to be loaded; its tile; steps left of that
    unsigned vector_;                        // this lane's of it, in the column
    const char *values_, *scales_, *zeros_;  // of the tile
};

}  // namespace tango
