// What linear.cu and int8.cu share: the tile of a block of threads, and the rows that it brings to shared memory.
#pragma once

#include "common/platform.cuh"
#include "tango/linear.h"

namespace tango {

constexpr int kColumns = 128;                     // outputs of a block of threads
constexpr int kLargeRows = 128, kSmallRows = 64;  // rows of a block
constexpr int kVectorBytes = 16;
constexpr int kRowBytes = 64;  // of a row of x in a stage of the ring
constexpr int kRowVectors = kRowBytes / kVectorBytes;

// Brings 16 bytes, of which only some exist or the address may be odd, and fills up with zeros.
__device__ inline void bring(char* to, const char* from, int bytes) {
    if (bytes >= kVectorBytes && reinterpret_cast<uintptr_t>(from) % kVectorBytes == 0)
        return copy_async(shared_address(to), from);
    for (int i = 0; i < kVectorBytes; ++i) to[i] = i < bytes ? from[i] : 0;
}

// Where 16 bytes of a row are in a stage: swizzled, so that eight rows are in all banks.
__device__ inline int x_offset(int row, int vector) { return row * kRowBytes + (vector ^ row / 2 % 4) * kVectorBytes; }

// Brings kRows rows of x from `row` on, 64 bytes of each from byte `begin` on. Rows after the last one are the last
// one.
template <int kRows, int kThreads>
__device__ void bring_rows(char* stage, const void* x, int row, int rows, int begin, int bytes_of_row) {
    for (int i = threadIdx.x; i < kRows * kRowVectors; i += kThreads) {
        const int r = i / kRowVectors, vector = i % kRowVectors, at = begin + vector * kVectorBytes;
        const char* const from =
            static_cast<const char*>(x) + static_cast<size_t>(min(row + r, rows - 1)) * bytes_of_row;
        bring(stage + x_offset(r, vector), from + at, bytes_of_row - at);
    }
}

// Whether blocks have the larger number of rows: they read less, and smaller ones leave fewer SMs idle.
inline bool prefers_large(const TangoLinearShape& shape, int sms) {
    constexpr int kResident = 2;  // blocks of an SM
    const auto time = [&](int rows) {
        const int blocks = ceil_div(shape.rows, rows) * ceil_div(shape.outputs, kColumns);
        return ceil_div(blocks, sms * kResident) * rows;
    };
    return time(kLargeRows) <= time(kSmallRows);
}

}  // namespace tango
