// Divisions on the way from one phase to the next, where an integer division would be most of the instructions.
#pragma once

#include <cstdint>

#include "common/platform.cuh"

namespace tango {

// A divisor above 1 that is known before the launch. Exact where the dividend times it is below 2^32.
struct Divisor {
    int value;
    uint32_t inverse;

    Divisor() = default;
    explicit Divisor(int value) : value(value), inverse(static_cast<uint32_t>(((1ull << 32) + value - 1) / value)) {}

    __device__ int divide(int dividend) const {
        return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(dividend)) * inverse >> 32);
    }
};

// A quotient of positive numbers below 2^20.
__device__ inline int quotient(int dividend, int divisor) {
    return static_cast<int>(__fdividef(dividend + 0.5f, static_cast<float>(divisor)));
}

}  // namespace tango
