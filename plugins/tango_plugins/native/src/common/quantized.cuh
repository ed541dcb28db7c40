// Results as they are stored: rounded to their type, or quantized to FP8 or INT8 with a scale.
#pragma once

#include "common/fp8.cuh"

namespace tango {

// The scale of a quantized result, and its inverse.
struct ResultScale {
    float step, inverse;
};

inline ResultScale result_scale(float step) { return {step, 1.0f / step}; }

template <typename T, int kSize>
__device__ void store_as(T (&to)[kSize], const float (&from)[kSize], const ResultScale&) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) to[j] = static_cast<T>(from[j]);
}

template <int kSize>
__device__ void store_as(Fp8 (&to)[kSize], const float (&from)[kSize], const ResultScale& scale) {
#pragma unroll
    for (int j = 0; j < kSize; j += 2) {
        const bool is_pair = j + 1 < kSize;
        const uint16_t pair = fp8_pair(from[j] * scale.inverse, is_pair ? from[j + is_pair] * scale.inverse : 0.0f);
        to[j].bits = static_cast<uint8_t>(pair);
        if (is_pair) to[j + is_pair].bits = static_cast<uint8_t>(pair >> 8);
    }
}

// A division, as in QuantizeLinear: times the inverse, what is near the middle of two integers may go to the other one.
template <int kSize>
__device__ void store_as(int8_t (&to)[kSize], const float (&from)[kSize], const ResultScale& scale) {
#pragma unroll
    for (int j = 0; j < kSize; ++j)
        to[j] = static_cast<int8_t>(max(-128, min(127, __float2int_rn(from[j] / scale.step))));
}

}  // namespace tango
