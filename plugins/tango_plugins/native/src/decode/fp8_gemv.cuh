// The GEMV of matrices in FP8, which lie by columns: [columns, rows], with one scale.
#pragma once

#include "gemv.cuh"

namespace tango {

constexpr int kFp8Vector = 16;                              // rows of one load
constexpr int kFp8Lanes = 16;                               // that share the rows of a column
constexpr int kFp8Columns = kSector / (kWarp / kFp8Lanes);  // of a lane: a tile has 16 columns
constexpr int kFp8StepRows = kFp8Lanes * kFp8Vector;
constexpr int kFp8RingBytes = kFp8Columns * kThreads * kFp8Vector;

// What numbers in FP8 are multiplied by after halves_of_fp8().
__device__ inline float fp8_scale(const TangoMatrix& matrix) {
    return 256.0f * __half2float(*static_cast<const __half*>(matrix.scales));
}

// Two numbers in FP8, in the upper bytes of two halves, as fp16, divided by 256. In the bits of fp16, after its sign,
// they are that: three bits of the mantissa follow four of an exponent whose bias is 8 less.
__device__ inline uint32_t halves_of_fp8(uint32_t two) { return (two & 0x80008000u) | (two >> 1 & 0x3f803f80u); }

// Eight of them as pairs in the order of PackedInts<8>.
__device__ inline void unpack_fp8(uint32_t (&pairs)[4], const uint2& words) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        pairs[i] = halves_of_fp8(__byte_perm(i % 2 == 0 ? words.x : words.y, 0, i < 2 ? 0x2200 : 0x3311));
}

// Adds the product of 16 numbers in FP8, divided by 256, and fp32.
__device__ inline void multiply_add_fp8(float& sum, const uint4& vector, const float (&x)[kFp8Vector]) {
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t two = __byte_perm(words[i / 2], 0, i % 2 == 0 ? 0x1404 : 0x3424);
        const float2 pair = __half22float2(half2_of(halves_of_fp8(two)));
        sum += pair.x * x[2 * i];
        sum += pair.y * x[2 * i + 1];
    }
}

// A step is the next 256 rows of 16 columns: half of a warp has eight columns, and a lane 16 rows of each. The steps of
// all tiles are one sequence, of which each warp has an equal share; where a warp begins or ends inside of a tile, the
// sums of several warps are added. A lane's loads go through its own ring in shared memory, one step ahead.
class Fp8Gemv : public GemvPart {
  public:
    __device__ Fp8Gemv(const GemvPart& part, const Ring& ring, const TangoMatrix& first, const TangoMatrix& second)
        : GemvPart(part), ring_(ring.memory + threadIdx.x), first_(first), second_(second) {
        seek();
    }

    __device__ void start() {
        open(begin_);
#pragma unroll
        for (int c = 0; c < kFp8Columns; ++c) load(c);
    }

    __device__ void skip_started() {}

    // As RowGemv::run().
    template <typename Emit>
    __device__ void run(const float* input, float* acc, Emit emit) {
        while (is_valid()) {
            accumulate(input, acc);
            const int columns = tiles() * kSector, second = partition_.matrices == 2 ? columns : 0;
            const float scale = fp8_scale(first_), second_scale = second == 0 ? 0.0f : fp8_scale(second_);
#pragma unroll 1
            for (int c = threadIdx.x; c < columns; c += kThreads)
                emit(column_ + c, split_, total(acc, c) * scale, total(acc, c + second) * second_scale);
            index_ += gridDim.x;
            if (!is_valid()) return;
            select();
            seek();
            start();
            sync_threads();
        }
        copy_wait<0>();
        sync_threads();
    }

  private:
    // Of the block's part: tiles of a matrix, steps of a tile, and of all tiles.
    __device__ int tiles() const { return min(partition_.tile_n, partition_.columns - column_) / kSector; }
    __device__ int tile_steps() const { return ceil_div(rows_, kFp8StepRows); }
    __device__ int steps() const { return is_valid() ? partition_.matrices * tiles() * tile_steps() : 0; }

    // Finds this warp's steps.
    __device__ void seek() {
        const int all = steps(), sharers = max(1, min(kWarps, all));
        begin_ = min(warp_id(), sharers) * all / sharers;
        end_ = min(warp_id() + 1, sharers) * all / sharers;
    }

    // The lane's first row of a step, within the split.
    __device__ int lane_row(int step) const {
        return step % tile_steps() * kFp8StepRows + lane_id() % kFp8Lanes * kFp8Vector;
    }

    // Makes a step the next to be loaded; the second matrix's tiles follow the first's.
    __device__ void open(int step) {
        from_ = nullptr;
        if (step >= end_ || lane_row(step) >= rows_) return;
        const int tile = step / tile_steps();
        const bool second = tile >= tiles();
        const int column = column_ + (second ? tile - tiles() : tile) * kSector + lane_id() / kFp8Lanes * kFp8Columns;
        from_ = static_cast<const char*>((second ? second_ : first_).values) +
                static_cast<size_t>(column) * partition_.rows + row_ + lane_row(step);
    }

    // Starts the load of one of the lane's columns of the open step.
    __device__ void load(int c) {
        if (from_ != nullptr)
            copy_async(shared_address(ring_ + c * kThreads), from_ + static_cast<size_t>(c) * partition_.rows);
        copy_commit();
    }

    // Adds this warp's steps, and stores the sums of each tile.
    __device__ void accumulate(const float* input, float* acc) {
        float sum[kFp8Columns] = {};
#pragma unroll 1
        for (int step = begin_; step < end_; ++step) {
            const int row = lane_row(step);
            const bool is_active = row < rows_;
            float x[kFp8Vector];
#pragma unroll
            for (int i = 0; i < kFp8Vector; ++i) x[i] = is_active ? input[row + i] : 0.0f;
            open(step + 1);
#pragma unroll
            for (int c = 0; c < kFp8Columns; ++c) {
                copy_wait<kFp8Columns - 1>();
                if (is_active) multiply_add_fp8(sum[c], ring_[c * kThreads], x);
                load(c);
            }
            if ((step + 1) % tile_steps() == 0 || step + 1 == end_) store(sum, acc, step / tile_steps());
        }
        copy_wait<0>();
        sync_threads();
    }

    // Adds the lanes of a column. A warp and a tile of its have a place of their own: the next warp's tiles begin where
    // this one's end.
    __device__ static void store(float (&sum)[kFp8Columns], float* acc, int tile) {
#pragma unroll
        for (int c = 0; c < kFp8Columns; ++c) {
            for (int offset = kFp8Lanes / 2; offset > 0; offset /= 2)
                sum[c] += __shfl_xor_sync(kAllLanes, sum[c], offset);
            if (lane_id() % kFp8Lanes == 0)
                acc[(warp_id() + tile) * kSector + lane_id() / kFp8Lanes * kFp8Columns + c] = sum[c];
            sum[c] = 0.0f;
        }
    }

    // The sum of a column over the warps that had steps of its tile.
    __device__ float total(const float* acc, int column) const {
        const int tile = column / kSector, all = steps(), last = warp_of((tile + 1) * tile_steps() - 1, all);
        float sum = 0.0f;
        for (int warp = warp_of(tile * tile_steps(), all); warp <= last; ++warp) sum += acc[warp * kSector + column];
        return sum;
    }

    // The warp that has a step: the last that begins no later.
    __device__ static int warp_of(int step, int all) { return (min(kWarps, all) * (step + 1) - 1) / all; }

    uint4* ring_;
    const TangoMatrix &first_, &second_;
    int begin_, end_;   // this warp's steps
    const char* from_;  // of the lane's first column of the open step, or null
};

}  // namespace tango
