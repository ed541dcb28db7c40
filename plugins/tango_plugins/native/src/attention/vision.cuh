// What vision.cu and vision_sm90.cu share: which tokens attend to each other, and where their tensors are.
#pragma once

#include "attention/flash.cuh"
#include "tango/vision_attention.h"

namespace tango {

// Tokens that attend to each other: a frame's, or those of one of its windows, row by row.
struct Group {
    int first, size;  // first token, counted over all frames; number of tokens
    int gap;          // tokens of the grid between two rows of the group
    float row_share;  // of one token in a row of the group

    // Tokens from the first one of the group to one of its others. A window's, at most 2^20, are exact in fp32.
    __device__ int offset(int index) const {
        return gap == 0 ? index : index + static_cast<int>((index + 0.5f) * row_share) * gap;
    }
};

__device__ inline Half8 biased(const Half8& vector, const Half8& bias) {
    Half8 sum;
#pragma unroll
    for (int i = 0; i < Half8::kSize / 2; ++i) sum.at[i] = __hadd2(vector.at[i], bias.at[i]);
    return sum;
}

// The argument of the kernels.
struct VisionPass {
    TangoVisionAttentionShape shape;
    TangoVisionAttentionTensors tensors;
    int window_rows, window_columns;   // of a window that is not cut off; of a frame, if there are no windows
    int windows_down, windows_across;  // of a frame
    float scale;                       // of the scores, for a softmax in base 2

    __host__ __device__ int groups() const { return shape.frames * windows_down * windows_across; }
    __host__ __device__ int largest_group() const { return window_rows * window_columns; }

    __device__ Group group(int index) const {
        int frame = index, row = 0, column = 0;
        if (windows_down * windows_across > 1) {
            frame = index / (windows_down * windows_across);
            row = index / windows_across % windows_down * window_rows;
            column = index % windows_across * window_columns;
        }
        const int rows = min(window_rows, shape.rows - row), columns = min(window_columns, shape.columns - column);
        const int first = (frame * shape.rows + row) * shape.columns + column;
        return {first, rows * columns, shape.columns - columns, 1.0f / columns};
    }

    // A head of a group's first token; the others are stride elements apart.
    __device__ const __half* query(const Group& group, int head) const {
        return at(tensors.query, group, shape.query_stride, head);
    }
    __device__ const __half* key(const Group& group, int head) const {
        return at(tensors.key, group, shape.key_stride, head);
    }
    __device__ const __half* value(const Group& group, int head) const {
        return at(tensors.value, group, shape.value_stride, head);
    }
    __device__ __half* attn_out(const Group& group, int head) const {
        return static_cast<__half*>(tensors.attn_out) +
               (static_cast<size_t>(group.first) * shape.heads + head) * shape.head_dim;
    }

  private:
    __device__ const __half* at(const void* tensor, const Group& group, int stride, int head) const {
        return static_cast<const __half*>(tensor) + static_cast<size_t>(group.first) * stride + head * shape.head_dim;
    }
};

// Starts copying kRows rows of a head, with kThreads threads. Rows past the last one of the group repeat it. In shared
// memory, vector v of row r is at r kRowBytes + v kVectorBytes; kVectors is the most that a row has.
template <int kThreads, int kVectors, int kRows, int kRowBytes, int kVectorBytes>
__device__ inline void copy_rows(SharedAddress to, const __half* from, int stride, int head_dim, const Group& group,
                                 int first) {
    constexpr int kRowsPerPass = kThreads / kVectors;
    constexpr auto kCopy = kVectorBytes == 16 ? copy_async : copy_async_cached;
    const int row = threadIdx.x / kVectors, vector = threadIdx.x % kVectors;
    if (row >= kRowsPerPass || vector * Half8::kSize >= head_dim) return;
    to += vector * kVectorBytes + row * kRowBytes;
    from += vector * Half8::kSize;
    if (group.gap == 0 && first + kRows <= group.size) {
        from += (first + row) * stride;
#pragma unroll
        for (int r = 0; r < kRows; r += kRowsPerPass, from += kRowsPerPass * stride)
            if (r + kRowsPerPass <= kRows || r + row < kRows) kCopy(to + r * kRowBytes, from);
    } else {
#pragma unroll 1
        for (int r = 0; r + row < kRows; r += kRowsPerPass)
            kCopy(to + r * kRowBytes, from + group.offset(min(first + row + r, group.size - 1)) * stride);
    }
}

// Starts copying a head's part of a bias, unless it is null. A thread of the warp copies a vector.
__device__ inline void copy_bias(SharedAddress to, const void* bias, int head, int head_dim, int warp) {
    const int d = lane_id() * Half8::kSize;
    if (bias == nullptr || warp_id() != warp || d >= head_dim) return;
    copy_async(to + d * sizeof(__half), static_cast<const __half*>(bias) + head * head_dim + d);
}

cudaError_t vision_attention_sm90(const VisionPass& pass, int sms, cudaStream_t stream);

}  // namespace tango
