// Matrices whose weights are blocks of 4 or 8 bits with a scale each, along the rows of one column: how their weights
// are read, and their GEMV.
#pragma once

#include "gemv.cuh"

namespace tango {

constexpr int kUnit = 32;                                 // rows of the smallest block
constexpr int kBlockDepth = 6;                            // steps of a warp that are in flight
constexpr int kScalesAt = kTileColumns * 64;              // in a stage, after its weights
constexpr int kZerosAt = kScalesAt + 2 * kWarp * 4;       // two words for each lane
constexpr int kMaxStageBytes = kZerosAt + 2 * kWarp * 4;  // without zero points, a stage ends before them

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
    constexpr int kRows = kVectorRows<kBits>, kParts = kRows / kVector, kStepParts = 4 * kParts;
    const int parts = ceil_div(rows, kVector * kStepParts) * kStepParts;
#pragma unroll 1
    for (int first = (parts - 1) / kThreads * kThreads; first >= 0; first -= kThreads) {  // from the end: it grows
        const int part = first + threadIdx.x, row = part * kVector;
        float x[kVector], sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            x[i] = row < rows ? input[row + i] / 16 : 0.0f;
            sum += x[i];
        }
#pragma unroll
        for (int offset = 1; offset < kParts; offset *= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
        sync_threads();
        if (part >= parts) continue;
        __half2 high[kVector / 2], low[kVector / 2];
#pragma unroll
        for (int i = 0; i < kVector / 2; ++i) {
            const float a = x[PackedInts<kBits>::first(i)], b = x[PackedInts<kBits>::second(i)];
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

// A block's weights in steps, which a warp takes one after the other. A step is 64 bytes of each of 16 columns, a
// vector for each lane of a quad, of two columns that are 8 apart. A tile of 16 columns has some, and the steps of all
// tiles are one sequence, of which each warp has an equal share. They go through the warp's ring in shared memory.
template <int kBits>
class BlockSteps : public GemvPart {
  public:
    __device__ BlockSteps(const GemvPart& part, const Ring& ring, const TangoMatrix& first, const TangoMatrix& second)
        : GemvPart(part),
          first_(first),
          second_(second),
          stage_bytes_(first.zeros == nullptr ? kZerosAt : kMaxStageBytes),
          blocks_((partition_.rows + first.group - 1) / first.group),
          shift_((first.group >> 6) + (kBits == 8)),
          tile_steps_(ceil_div(rows_, 4 * kRows)),
          last_((row_ + rows_ - 1) / kRows) {
        depth_ = ring_depth(ring.bytes / (kWarps * stage_bytes_), kBlockDepth);
        ring_ = reinterpret_cast<char*>(ring.memory) + warp_id() * depth_ * stage_bytes_;
        seek();
    }

    __device__ void start() {
#pragma unroll 1
        for (int i = 0; i < depth_; ++i) load(i * stage_bytes_);
    }

    // To be called where another object has started them.
    __device__ void skip_started() { open(min(begin_ + depth_, end_)); }

  protected:
    static constexpr int kRows = kVectorRows<kBits>;
    using Ints = PackedInts<kBits>;

    // Where a vector of a column is in a stage. The vectors of a step that belong to eight columns are in all banks.
    __device__ static int place(int column, int vector) { return column * 64 + (vector ^ column / 2 % 4) * 16; }

    // Steps of all tiles.
    __device__ int steps() const { return is_valid() ? partition_.matrices * tiles() * tile_steps_ : 0; }

    // Finds this warp's steps.
    __device__ void seek() {
        begin_ = first_step(warp_id(), steps());
        end_ = first_step(warp_id() + 1, steps());
        open(begin_);
    }

    // The step's first vector of a column, of those of the whole matrix. A vector's scale and zero point, as numbers of
    // 16 and kBits bits from the tile's first. Tiles begin at words, and the column that is 8 farther has them at the
    // same place of a word.
    __device__ unsigned first_vector(int step) const { return row_ / kRows + 4 * step; }
    __device__ unsigned scale(unsigned vector) const { return lane_id() / 4 * blocks_ + (vector >> shift_); }
    __device__ unsigned zero(unsigned vector) const {
        return lane_id() / 4 * zero_bytes() * (8 / kBits) + (vector >> shift_);
    }

    __device__ bool has_zeros() const { return stage_bytes_ == kMaxStageBytes; }

    // The zero point of a vector, in the word that has it.
    __device__ uint32_t zero_in(uint32_t word, unsigned vector) const {
        return word >> zero(vector) % (32 / kBits) * kBits & ((1 << kBits) - 1);
    }

    // Calls multiply(stage, step) with each of this warp's steps of a tile, then store(tile). All the time depth_ of
    // them are in flight.
    template <typename Multiply, typename Store>
    __device__ void run_steps(Multiply multiply, Store store) {
        int tile = begin_ / max(1, tile_steps_), step = begin_ - tile * tile_steps_, at = 0;
#pragma unroll 1
        for (int left = end_ - begin_; left > 0;) {
            wait_for_oldest<kBlockDepth>(depth_);
            multiply(ring_ + at, step);
            load(at);
            at += stage_bytes_;
            if (at == depth_ * stage_bytes_) at = 0;
            --left;
            if (++step < tile_steps_ && left > 0) continue;
            store(tile++);
            step = 0;
        }
        copy_wait<0>();
        sync_threads();
    }

    const TangoMatrix &first_, &second_;
    int stage_bytes_, depth_;
    char* ring_;               // the warp's
    unsigned blocks_, shift_;  // of a whole column: blocks, each of 1 << shift_ vectors
    int tile_steps_;
    unsigned last_;    // vector of a column that the block has
    int begin_, end_;  // this warp's steps

  private:
    // Makes a step the next to be loaded.
    __device__ void open(int step) {
        left_ = end_ - step;
        tile_ = step / max(1, tile_steps_);
        open_tile();
        const int skipped = step - tile_ * tile_steps_;
        tile_left_ -= skipped;
        vector_ += 4 * skipped;
    }

    // Begins to load a tile; the second matrix's tiles follow the first's.
    __device__ void open_tile() {
        const bool second = tile_ >= tiles();
        const TangoMatrix& matrix = second ? second_ : first_;
        const size_t column = column_ + (second ? tile_ - tiles() : tile_) * kTileColumns;
        values_ = static_cast<const char*>(matrix.values) + (column + lane_id() / 4) * row_bytes();
        scales_ = static_cast<const char*>(matrix.scales) + column * blocks_ * 2;
        zeros_ = static_cast<const char*>(matrix.zeros) + column * zero_bytes();
        tile_left_ = tile_steps_;
        vector_ = first_vector(0) + lane_id() % 4;
    }

    // Bytes of a column, and of its zero points.
    __device__ unsigned row_bytes() const { return (blocks_ << shift_) * 16; }
    __device__ unsigned zero_bytes() const { return (blocks_ * kBits + 7) / 8; }

    // Starts the loads of the next step, if there is one. A lane that has no vector in it reads its last scale again.
    __device__ void load(int stage) {
        if (left_ > 0) {
            const SharedAddress to = shared_address(ring_ + stage);
            if (vector_ <= last_) {
                const SharedAddress own = to + place(lane_id() / 4, lane_id() % 4);
                const char* const from = values_ + vector_ * 16;
                copy_async_prefetch(own, from);
                copy_async_prefetch(own + kWarp * 16, from + 8 * row_bytes());
            }
            const SharedAddress words = to + kScalesAt + lane_id() * 4;
            const unsigned vector = min(vector_, last_);
            load_words(words, scales_ + scale(vector) / 2 * 4, 16 * blocks_);
            if (has_zeros())
                load_words(words + kZerosAt - kScalesAt, zeros_ + zero(vector) * kBits / 32 * 4, 8 * zero_bytes());
            --left_;
            vector_ += 4;
            if (--tile_left_ == 0) {
                ++tile_;
                open_tile();
            }
        }
        copy_commit();
    }

    __device__ static void load_words(SharedAddress to, const char* from, unsigned distance) {
        copy_async_word(to, from);
        copy_async_word(to + kWarp * 4, from + distance);
    }

    int left_, tile_left_;                   // steps to be loaded, and those of the next one's tile
    int tile_;                               // that
    unsigned vector_;                        // this lane's of the next step, in the column
    const char *values_, *scales_, *zeros_;  // of the tile
};

// A warp multiplies a step with tensor cores. The columns of their other operand belong to the lanes of a quad, two to
// each: one has fp16 of the input of that lane's vectors, the other the rest, so that nothing is lost of fp32, and
// zeros in place of the other lanes' rows. So a lane gets the products of its own vectors, each of which is in one
// block. It scales and adds them; what it reads it has loaded itself. Where a warp begins or ends inside of a tile, the
// sums of several warps are added.
template <int kBits>
class BlockGemv : public BlockSteps<kBits> {
    using Base = BlockSteps<kBits>;
    using Ints = typename Base::Ints;

  public:
    using Base::Base;

    // As RowGemv::run(), but that the input is overwritten.
    template <typename Emit>
    __device__ void run(const float* input, float* acc, Emit emit) {
        if (!this->is_valid()) {  // nothing to do for this block
            copy_wait<0>();
            sync_threads();
            return;
        }
        split_input<kBits>(const_cast<float*>(input), this->rows_);
#pragma unroll 1
        while (true) {
            accumulate(input, acc);
            const int columns = this->tiles() * kTileColumns, second = this->partition_.matrices == 2 ? columns : 0;
#pragma unroll 1
            for (int c = threadIdx.x; c < columns; c += kThreads)
                emit(this->column_ + c, this->split_, total(acc, c), total(acc, c + second));
            if (!this->next()) return;
            this->seek();
            this->start();
            sync_threads();
        }
    }

  private:
    static constexpr int kParts = Base::kRows / kVector;

    // Adds this warp's steps, and stores the sums of each tile.
    __device__ void accumulate(const float* input, float* acc) {
        uint4 x[kParts] = {};
        float sum[2] = {};
        this->run_steps([&](const char* stage, int step) { multiply(sum, x, input, stage, step); },
                        [&](int tile) { store(sum, acc, tile); });
    }

    // Adds a step: of two columns, a lane's vectors times its input. x is zero in all lanes but the two of each column
    // of the tensor cores' other operand that belongs to their vectors.
    __device__ void multiply(float (&sum)[2], uint4 (&x)[kParts], const float* input, const char* stage,
                             int step) const {
        const int column = lane_id() / 4, own = lane_id() % 4;
        const unsigned vector = this->first_vector(step) + own;
        input += (4 * step + own) * kVectorInputs<kBits>;
        if (column / 2 == own)
#pragma unroll
            for (int i = 0; i < kParts; ++i)
                x[i] = reinterpret_cast<const uint4*>(input + column % 2 * (Base::kRows / 2))[i];
        const uint4* const values = reinterpret_cast<const uint4*>(stage + Base::place(column, own));
        const uint4 weights[2] = {values[0], values[kWarp]};
        float even[4] = {}, odd[4] = {};
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
            uint32_t low[4], high[4];
            unpack_eight(low, weights[0], i);
            unpack_eight(high, weights[1], i);
            mma(even, {low[0], high[0], low[1], high[1]}, {x[i].x, x[i].y});
            mma(odd, {low[2], high[2], low[3], high[3]}, {x[i].z, x[i].w});
        }
        const uint32_t* const words = reinterpret_cast<const uint32_t*>(stage + kScalesAt) + lane_id();
        const __half* const scales = reinterpret_cast<const __half*>(words) + this->scale(vector) % 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float zero = 1 << (kBits - 1);
            if (this->has_zeros()) zero = this->zero_in(words[(kZerosAt - kScalesAt) / 4 + i * kWarp], vector);
            const float rounded = even[2 * i] + odd[2 * i] / Ints::kOdd;
            const float rest = even[2 * i + 1] + odd[2 * i + 1] / Ints::kOdd;
            sum[i] += __half2float(scales[i * 2 * kWarp]) * (rounded + rest / 2048 - zero * input[Base::kRows]);
        }
    }

    // Eight integers of a vector.
    __device__ static void unpack_eight(uint32_t (&pairs)[4], const uint4& vector, int part) {
        constexpr int kWords = kBits / 4;
        const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
        for (int i = 0; i < kWords; ++i) Ints::unpack(pairs + i * Ints::kPairs, words[part * kWords + i]);
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
        sum[0] = sum[1] = 0.0f;
    }

    // The sum of a column over the warps that had steps of its tile.
    __device__ float total(const float* acc, int column) const {
        const int tile = column / kTileColumns, all = this->steps();
        const int last = warp_of((tile + 1) * this->tile_steps_ - 1, all);
        float sum = 0.0f;
        for (int warp = warp_of(tile * this->tile_steps_, all); warp <= last; ++warp)
            sum += acc[warp * kTileColumns + column];
        return sum;
    }
};

}  // namespace tango
