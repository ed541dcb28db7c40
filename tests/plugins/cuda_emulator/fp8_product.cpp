// In the place of cuBLASLt, which has no emulation: the product of FP8 matrices, element by element.
#include "linear/fp8_product.h"

#include <cuda_fp16.h>

#include <cmath>

#include "common/platform.cuh"

namespace tango {
namespace {

float number(const void* numbers, size_t at) {
    const int bits = static_cast<const uint8_t*>(numbers)[at], exponent = bits >> 3 & 15, mantissa = bits & 7;
    const float size = (bits & 127) == 127 ? NAN
                       : exponent == 0     ? std::ldexp(static_cast<float>(mantissa), -9)
                                           : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    return bits & 128 ? -size : size;
}

float gelu(float u) { return 0.5f * u * (1.0f + std::tanh(0.79788456f * (u + 0.044715f * u * u * u))); }

}  // namespace

int multiply_fp8(const TangoLinearShape& shape, const TangoFp8LinearTensors& tensors, float x_scale, Epilogue epilogue,
                 cudaStream_t) {
    const auto [rows, inputs, outputs] = shape;
    for (size_t row = 0; row < static_cast<size_t>(rows); ++row)
        for (size_t output = 0; output < static_cast<size_t>(outputs); ++output) {
            float sum = 0.0f;
            for (int i = 0; i < inputs; ++i)
                sum += number(tensors.x, row * inputs + i) * number(tensors.weight, output * inputs + i);
            const float scaled = sum * x_scale * *tensors.weight_scale;
            const size_t at = row * outputs + output;
            if (epilogue == Epilogue::kNone) {
                static_cast<__half*>(tensors.y)[at] = __float2half(scaled);
            } else {
                const float biased = scaled + __half2float(static_cast<const __half*>(tensors.bias)[output]);
                const float steps = gelu(biased) * *tensors.y_factor;
                static_cast<uint8_t*>(tensors.y)[at] = static_cast<uint8_t>(fp8_pair(steps, 0.0f));
            }
        }
    return TANGO_OK;
}

}  // namespace tango
