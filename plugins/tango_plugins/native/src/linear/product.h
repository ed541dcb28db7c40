// The product of two matrices of FP8 or fp16: cuBLASLt's. Tests on a CPU have other definitions of these functions.
#pragma once

#include <cuda_runtime_api.h>

#include "tango/linear.h"

namespace tango {

// y = (x weight) factor, or GELU of its sum with a bias. Device memory in fp16, but for what FP8 changes.
struct Product {
    const char* name;  // what errors call it
    TangoLinearShape shape;
    const void* x;       // [rows, inputs]
    const void* weight;  // [inputs, outputs], or [outputs, inputs] where by_outputs
    void* y;             // [rows, outputs]
    float factor = 1.0f;
    const void* bias = nullptr;  // [outputs]; null without GELU

    bool by_outputs = false;
    int weight_pitch = 0, y_pitch = 0;  // elements from row to row; 0 where there is nothing between them

    // x and weight are FP8, and y is FP8 with GELU.
    bool is_fp8 = false;
    const float* weight_scale = nullptr;  // [1], another factor
    const float* y_factor = nullptr;      // [1], of y in FP8; null without GELU

    bool has_gelu() const { return bias != nullptr; }
};

// Enqueues it; returns a TangoStatus. The members have been checked.
int multiply(const Product& product, cudaStream_t stream);

// Whether there is a cuBLASLt, which it loads.
bool has_cublaslt();

// Loads cuBLASLt, unless it is loaded; returns a TangoStatus, and its major version.
int load_cublaslt(const char* name, int& version);

}  // namespace tango
