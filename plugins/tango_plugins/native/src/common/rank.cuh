// An order of logits and their indices, as one integer for each.
#pragma once

#include "common/platform.cuh"
#include "tango/argmax.h"

namespace tango {

using Rank = unsigned long long;

// By value, then the lower index first. NaN is above all numbers, and 0 below the rank of every value.
__device__ inline Rank rank_of(float value, int index) {
    const unsigned bits = __float_as_uint(value + 0.0f);  // -0 equals 0
    const unsigned ordered = isnan(value) ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<Rank>(ordered) << 32 | (0xffffffffu - static_cast<unsigned>(index));
}

__device__ inline int index_of(Rank rank) { return static_cast<int>(0xffffffffu - static_cast<unsigned>(rank)); }

__device__ inline Rank warp_max_rank(Rank rank) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const Rank other = __shfl_xor_sync(kAllLanes, rank, offset);
        rank = other > rank ? other : rank;
    }
    return rank;
}

}  // namespace tango
