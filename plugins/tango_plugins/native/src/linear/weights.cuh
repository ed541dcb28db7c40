// Weights of integers: those of a block's outputs brought to shared memory and unpacked, for linear.cu, and their
// scales, for slabs.cu, too.
#pragma once

#include "common/integers.cuh"
#include "linear/blocks.cuh"
#include "linear/matrix.h"
#include "linear/tile.cuh"

namespace tango {

constexpr int kUnit = 32;  // inputs that are brought and unpacked at a time, and the smallest block of weights

// The argument of the kernel.
struct LinearJob {
    TangoLinearShape shape;
    TangoMatrix matrix;
    const __half* x;
    __half* y;
    int row_blocks;
    BlockPlaces places;
    int shift;  // a block of weights has 1 << shift units of 32 inputs
};

// What a thread brings for its output in a stage, besides weights.
struct Scaling {
    uint32_t scale;  // fp16, twice
    uint32_t zero;   // as unpack_pair() takes it
};

// Weights in blocks of 4 or 8 bits. A unit has [128 outputs, 32 inputs].
template <int kBits>
struct Blocks {
    static constexpr int kUnitBytes = kUnit * kBits / 8;
    static constexpr int kBytes = kColumns * kUnitBytes;

    // Starts the copies of one output of 128, for inputs [32 unit, 32 unit + 32).
    __device__ static void start(const LinearJob& job, char* to, int column, int own, int unit) {
        const int output = min(column + own, job.shape.outputs - 1);
        const char* const from =
            static_cast<const char*>(job.matrix.values) + job.places.value(output, unit * kUnitBytes);
#pragma unroll
        for (int i = 0; i < kUnitBytes; i += kVectorBytes)
            copy_async(shared_address(to) + own * kUnitBytes + i, from + i);
    }

    __device__ static Scaling scaling(const LinearJob& job, int column, int own, int unit) {
        const int output = min(column + own, job.shape.outputs - 1);
        const int group = unit >> job.shift, bit = group * kBits;
        const __half scale = static_cast<const __half*>(job.matrix.scales)[job.places.scale(output, group)];
        uint32_t zero = 1 << (kBits - 1);
        if (job.matrix.zeros != nullptr) {
            const size_t zero_bytes = (job.places.blocks * kBits + 7) / 8;
            const uint8_t* zeros = static_cast<const uint8_t*>(job.matrix.zeros) + output * zero_bytes;
            zero = zeros[bit / 8] >> bit % 8 & ((1 << kBits) - 1);
        }
        return {bits_of(__half2half2(scale)),
                (kBits == 4 ? 0xd400e400u : 0xe400e400u) + zero * (kBits == 4 ? 0x100001u : 0x10001u)};
    }

    // Two outputs of a lane's, 8 apart of 16 from `column` on: inputs 8 j + 2 t and 8 j + 2 t + 1 for its t, and j from
    // 0 to 3.
    __device__ static void unpack_two(uint32_t (&pairs)[2][4], const char* unit, const Scaling* scalings, int column) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int own = column + lane_id() / 4 + 8 * i;
            const Scaling scaling = scalings[own];
            unpack_output(pairs[i], unit + own * kUnitBytes, scaling.zero);
#pragma unroll
            for (int j = 0; j < 4; ++j) pairs[i][j] = mul2(pairs[i][j], scaling.scale);
        }
    }

    __device__ static void unpack_output(uint32_t (&pairs)[4], const char* output, uint32_t zero) {
        const int t = lane_id() % 4;
        const uint4* const from = reinterpret_cast<const uint4*>(output);
        if constexpr (kBits == 4) {
            const uint4 words = *from;
            const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) pairs[j] = unpack_pair(word[j], t, zero);
        } else {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint4 words = from[j];
                pairs[2 * j] = unpack_pair(make_uint2(words.x, words.y), t, zero);
                pairs[2 * j + 1] = unpack_pair(make_uint2(words.z, words.w), t, zero);
            }
        }
    }

    static constexpr bool kNeighbors = false;

    __device__ static float factor(const LinearJob&, int) { return 1.0f; }
};

// Weights of 8 bits by rows. A unit has [32 inputs, 128 outputs].
struct Rows {
    static constexpr int kBytes = kColumns * kUnit;
    static constexpr int kVectors = kColumns / kVectorBytes;  // of a row

    __device__ static void start(const LinearJob& job, char* to, int column, int own, int unit) {
#pragma unroll
        for (int i = own; i < kUnit * kVectors; i += kColumns) {
            const int row = i / kVectors, vector = i % kVectors, first = column + vector * kVectorBytes;
            const size_t input = static_cast<size_t>(min(unit * kUnit + row, job.shape.inputs - 1));
            const char* const from = static_cast<const char*>(job.matrix.values) + input * job.shape.outputs + first;
            bring(to + row * kColumns + swizzled(row, vector), from, job.shape.outputs - first);
        }
    }

    __device__ static Scaling scaling(const LinearJob&, int, int, int) { return {}; }

    // Bytes are read in pairs, so that a lane's two outputs are neighbors.
    __device__ static void unpack_two(uint32_t (&pairs)[2][4], const char* unit, const Scaling*, int column) {
        const int row = lane_id();
        uint32_t words[4];
        load_transposed(words, shared_address(const_cast<char*>(unit)) + row * kColumns + swizzled(row, column / 16));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            pairs[0][j] = unpack_signed<0, 2>(words[j]);
            pairs[1][j] = unpack_signed<1, 3>(words[j]);
        }
    }

    static constexpr bool kNeighbors = true;

    __device__ static float factor(const LinearJob& job, int column) {
        return static_cast<const float*>(job.matrix.scales)[column];
    }

  private:
    __device__ static int swizzled(int row, int vector) { return (vector ^ row % 8) * kVectorBytes; }
};

}  // namespace tango
