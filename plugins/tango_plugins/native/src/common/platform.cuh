// All that kernels use below C++: launches, shared memory, asynchronous copies, tensor cores, named barriers, fast
// arithmetic.
//
// A header named by TANGO_PLATFORM_HEADER replaces it: tests compile the kernels for threads of a CPU in this way.
#pragma once

#ifdef TANGO_PLATFORM_HEADER
#include TANGO_PLATFORM_HEADER
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/copy.cuh"
#include "common/launch.cuh"
#include "common/math.cuh"
#include "common/mma.cuh"
#include "common/named_barrier.cuh"
#endif

#include "common/quantized.cuh"
#include "common/vector.cuh"
#include "common/warp.cuh"
