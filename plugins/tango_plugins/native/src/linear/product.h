// The product of two matrices of FP8 or fp16: cuBLASLt's. Tests on a CPU have other definitions of these functions.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "tango/linear.h"

namespace tango {

// y = epilogue((x weight) factor). Device memory in fp16, but for what FP8 changes. What is not read is null.
struct Product {
    const char* name;  // what errors call it
    TangoLinearShape shape;
    TangoEpilogue epilogue;
    const void* x;       // [rows, inputs]
    const void* weight;  // [inputs, outputs]
    const void* bias;    // [outputs]
    void* y;             // [rows, outputs]
    float factor = 1.0f;

    // x and weight are FP8, weight is [outputs, inputs], and y is FP8 with an epilogue.
    bool is_fp8 = false;
    const float* weight_scale = nullptr;  // [1], another factor
    const float* y_factor = nullptr;      // [1], of y in FP8

    void* workspace = nullptr;
    size_t workspace_bytes = 0;
};

// Enqueues it; returns a TangoStatus. The members have been checked.
int multiply(const Product& product, cudaStream_t stream);

// Loads cuBLASLt, unless it is loaded; returns a TangoStatus, and its major version.
int load_cublaslt(const char* name, int& version);

}  // namespace tango
