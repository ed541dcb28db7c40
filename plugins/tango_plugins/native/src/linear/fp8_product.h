// The product of FP8 matrices: cuBLASLt's. Tests on a CPU have another definition of this function.
#pragma once

#include <cuda_runtime_api.h>

#include "tango/fp8.h"

namespace tango {

// What follows a product in the same kernel.
enum class Epilogue { kNone, kBiasGelu };

// Enqueues it; returns a TangoStatus. The arguments have been checked; without an epilogue, what only it reads is null.
int multiply_fp8(const TangoLinearShape& shape, const TangoFp8LinearTensors& tensors, float x_scale, Epilogue epilogue,
                 cudaStream_t stream);

}  // namespace tango
