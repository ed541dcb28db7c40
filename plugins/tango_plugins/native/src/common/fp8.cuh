// FP8 numbers: E4M3, with a sign, four bits of the exponent and three of the mantissa. The largest is 448; there is no
// infinity.
#pragma once

#include <cstdint>

namespace tango {

struct Fp8 {
    uint8_t bits;
};

// GPUs convert from sm_89 on, and the assembler of CUDA 12.1 is the first that knows it of that one.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ >= 900 || (__CUDA_ARCH__ == 890 && __CUDACC_VER_MAJOR__ >= 12))
#define TANGO_CONVERTS_FP8
#endif

// Both in FP8, the first in the low byte: rounded to nearest, saturated at 448; NaN stays.
__device__ inline uint16_t fp8_pair(float first, float second) {
#ifdef TANGO_CONVERTS_FP8
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\n" : "=h"(pair) : "f"(second), "f"(first));
    return pair;
#else
    const auto convert = [](float x) {
        const uint32_t bits = __float_as_uint(x), size = bits & 0x7fffffffu;
        uint32_t found = 0x7e;                 // 448
        if (size > 0x7f800000u) found = 0x7f;  // NaN
        if (size < 0x43e00000u) found = ((size + 0x7ffff + (size >> 20 & 1)) - (120u << 23)) >> 20;
        if (size < 0x3c800000u) found = static_cast<uint32_t>(rintf(fabsf(x) * 512.0f));  // below 2^-6: steps of 2^-9
        return static_cast<uint16_t>(found | (bits >> 24 & 0x80));
    };
    return static_cast<uint16_t>(convert(first) | convert(second) << 8);
#endif
}

// A result as it is stored: FP8 numbers stand for themselves times a scale, whose inverse is given; others for
// themselves.
template <typename T, int kSize>
__device__ void store_as(T (&to)[kSize], const float (&from)[kSize], float inverse_scale) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) to[j] = static_cast<T>(from[j]);
}

template <int kSize>
__device__ void store_as(Fp8 (&to)[kSize], const float (&from)[kSize], float inverse_scale) {
#pragma unroll
    for (int j = 0; j < kSize; j += 2) {
        const bool is_pair = j + 1 < kSize;
        const uint16_t pair = fp8_pair(from[j] * inverse_scale, is_pair ? from[j + is_pair] * inverse_scale : 0.0f);
        to[j].bits = static_cast<uint8_t>(pair);
        if (is_pair) to[j + is_pair].bits = static_cast<uint8_t>(pair >> 8);
    }
}

}  // namespace tango
