// The rotary embedding of patches' queries and keys, wherever it is computed: with the same bits.
#pragma once

#include "common/platform.cuh"

namespace tango {

// Rotates the dimensions i and d / 2 + i of a head. Which product is rounded is not left to the compiler.
__device__ inline void rotate_pair(float& low, float& high, float cosine, float sine) {
    const float a = low, b = high;
    low = fmaf(a, cosine, -(b * sine));
    high = fmaf(b, cosine, a * sine);
}

}  // namespace tango
