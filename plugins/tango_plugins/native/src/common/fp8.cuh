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

}  // namespace tango
