// Matrices whose weights are blocks of 4 or 8 bits with a scale each, for products of several vectors.
#pragma once

#include "batch_gemv.cuh"

namespace tango {

// Where a warp begins or ends inside of a tile, the sums of several warps are added. The integers of a block are
// multiplied exactly, and the result is scaled.
template <int kBits>
class BatchBlocks : public BlockSteps<kBits> {
    using Base = BlockSteps<kBits>;
    using Ints = typename Base::Ints;

  public:
    // The sums are in front of the ring.
    __device__ BatchBlocks(const GemvPart& part, const Ring& memory, const TangoMatrix& first,
                           const TangoMatrix& second)
        : Base(part, after_sums(part, memory), first, second), sums_(reinterpret_cast<float4*>(memory.memory)) {}

    // How many rows of the input must be there at first: all, and what fills up the last step.
    __device__ int first_rows() const { return ceil_div(this->rows_, kInputRows) * kInputRows; }

    static constexpr int kDistance = 8;  // of a lane's two columns

    // Adds this warp's steps, and stores the sums of each tile. A warp and a tile of its have a place of their own: the
    // next warp's tiles begin where this one's end.
    __device__ void accumulate(const Fragment* input) {
        float sum[4] = {};
        this->run_steps(
            [&](char* stage, int step) {
                __syncwarp();
                multiply(sum, stage, input, step);
                __syncwarp();
            },
            [&](int tile) {
                sums_[(warp_id() + tile) * kWarp + lane_id()] = make_float4(sum[0], sum[1], sum[2], sum[3]);
                sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
            });
    }

    // The lane's results of a tile, of the first matrix or the second: two columns of two sequences.
    __device__ float4 total(int matrix, int tile) const {
        constexpr float kFactor = 1.0f / kSubnormal;
        const int index = matrix * this->tiles() + tile, all = this->steps();
        const int last = warp_of((index + 1) * this->tile_steps_ - 1, all);
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int warp = warp_of(index * this->tile_steps_, all); warp <= last; ++warp)
            sum = sum + sums_[(warp + index) * kWarp + lane_id()];
        return make_float4(sum.x * kFactor, sum.y * kFactor, sum.z * kFactor, sum.w * kFactor);
    }

    // The first of the lane's two columns of a tile.
    __device__ static int lane_column() { return lane_id() / 4; }

  private:
    static constexpr int kFragments = Base::kRows / kFragmentRows;  // of a vector

    __device__ static Ring after_sums(const GemvPart& part, const Ring& memory) {
        const GemvPartition& partition = part.partition();
        const int bytes = (kWarps + partition.matrices * partition.tile_n / kTileColumns) * kTileBytes;
        return {memory.memory + bytes / sizeof(uint4), memory.bytes - bytes};
    }

    // Adds a step: of each vector the products of its fragments, which are scaled. A lane has a word of each vector of
    // two columns that are 8 apart.
    __device__ void multiply(float (&sum)[4], char* stage, const Fragment* input, int step) const {
        const int lane = lane_id(), own = Base::place(lane % 16, lane / 16);
        const uint32_t* const words = reinterpret_cast<const uint32_t*>(stage + kScalesAt) + lane / 4 * 4;
        input += 4 * step * kFragments * kWarp + lane;
#pragma unroll
        for (int two = 0; two < 4; two += 2) {
            uint32_t packed[4];
            load_matrices(packed, shared_address(stage + (own ^ two * 16)));
#pragma unroll
            for (int v = two; v < two + 2; ++v) {
                const unsigned vector = this->first_vector(step) + v;
                const __half* const scales = reinterpret_cast<const __half*>(words + v) + this->scale(vector) % 2;
                Minus minus[2] = {Minus(1 << (kBits - 1)), Minus(1 << (kBits - 1))};
                if (this->has_zeros())
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        minus[i] = Minus(this->zero_in(words[(kZerosAt - kScalesAt) / 4 + i * kWarp + v], vector));
                uint32_t low[Ints::kPairs], high[Ints::kPairs];
                unpack(low, packed[v % 2 * 2], minus[0]);
                unpack(high, packed[v % 2 * 2 + 1], minus[1]);
                float exact[4] = {}, rest[4] = {};
#pragma unroll
                for (int f = 0; f < kFragments; ++f) {
                    const Fragment x = input[(v * kFragments + f) * kWarp];
                    const uint32_t weights[4] = {low[2 * f], high[2 * f], low[2 * f + 1], high[2 * f + 1]};
                    mma(exact, weights, {x.x, x.y});
                    mma(rest, weights, {x.z, x.w});
                }
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    sum[i] += __half2float(scales[i / 2 * 2 * kWarp]) * (exact[i] + rest[i] / kLowScale);
            }
        }
    }

    // A zero point to be added, twice: to the first two pairs of integers, and to those that are kOdd times as large.
    struct Minus {
        uint32_t even, odd;

        __device__ explicit Minus(uint32_t zero)
            : even(0x80008000u | zero * 0x10001u), odd(0x80008000u | zero * (Ints::kOdd * 0x10001u)) {}
    };

    __device__ static void unpack(uint32_t (&pairs)[Ints::kPairs], uint32_t word, const Minus& minus) {
        Ints::unpack(pairs, word);
#pragma unroll
        for (int i = 0; i < Ints::kPairs; ++i) pairs[i] = add2(pairs[i], i < 2 ? minus.even : minus.odd);
    }

    float4* sums_;  // of all warps
};

}  // namespace tango
