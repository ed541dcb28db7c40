// In the place of cuBLASLt, which has no emulation: products of FP8 and of fp16 matrices, element by element.
#include "linear/product.h"

#include <cuda_fp16.h>

#include <cmath>

#include "common/platform.cuh"

namespace tango {
namespace {

float fp8(const void* numbers, size_t at) {
    const int bits = static_cast<const uint8_t*>(numbers)[at], exponent = bits >> 3 & 15, mantissa = bits & 7;
    const float size = (bits & 127) == 127 ? NAN
                       : exponent == 0     ? std::ldexp(static_cast<float>(mantissa), -9)
                                           : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    return bits & 128 ? -size : size;
}

float fp16(const void* numbers, size_t at) { return __half2float(static_cast<const __half*>(numbers)[at]); }

float gelu(float u) { return 0.5f * u * (1.0f + std::tanh(0.79788456f * (u + 0.044715f * u * u * u))); }

float sum_of(const Product& product, size_t row, size_t output) {
    const auto [_, inputs, outputs] = product.shape;
    const size_t pitch = product.weight_pitch ? product.weight_pitch : product.by_outputs ? inputs : outputs;
    const auto number = product.is_fp8 ? fp8 : fp16;
    float sum = 0.0f;
    for (int i = 0; i < inputs; ++i)
        sum += number(product.x, row * inputs + i) *
               number(product.weight, product.by_outputs ? output * pitch + i : i * pitch + output);
    return sum;
}

}  // namespace

int multiply(const Product& product, cudaStream_t) {
    const auto [rows, inputs, outputs] = product.shape;
    for (size_t row = 0; row < static_cast<size_t>(rows); ++row)
        for (size_t output = 0; output < static_cast<size_t>(outputs); ++output) {
            float y = sum_of(product, row, output) * product.factor;
            if (product.is_fp8) y *= *product.weight_scale;
            if (product.has_gelu()) y = gelu(y + fp16(product.bias, output));
            const size_t at = row * (product.y_pitch ? product.y_pitch : outputs) + output;
            if (product.y_factor == nullptr)
                static_cast<__half*>(product.y)[at] = __float2half(y);
            else
                static_cast<uint8_t*>(product.y)[at] = static_cast<uint8_t>(fp8_pair(y * *product.y_factor, 0.0f));
        }
    return TANGO_OK;
}

bool has_cublaslt() { return true; }

int load_cublaslt(const char*, int& version) {
    version = 13;
    return TANGO_OK;
}

}  // namespace tango
