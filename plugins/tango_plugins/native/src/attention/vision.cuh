// What vision.cu and vision_sm90.cu share: which tokens attend to each other, and where their tensors are.
#pragma once

#include "attention/flash.cuh"
#include "tango/vision_attention.h"

namespace tango {

// Tokens that attend to each other: a frame's, or those of one of its windows, row by row.
struct Group {
    int first, size;  // first token, counted over all frames; number of tokens
    int columns, grid_columns;

    __device__ int token(int index) const {
        if (columns == grid_columns) return first + index;
        return first + index / columns * grid_columns + index % columns;
    }
};

// The argument of the kernels.
struct VisionPass {
    TangoVisionAttentionShape shape;
    TangoVisionAttentionTensors tensors;
    int window_rows, window_columns;  // of a window that is not cut off; of a frame, if there are no windows
    float scale;                      // of the scores, for a softmax in base 2

    __host__ __device__ int windows_across() const { return ceil_div(shape.columns, window_columns); }
    __host__ __device__ int windows() const { return ceil_div(shape.rows, window_rows) * windows_across(); }
    __host__ __device__ int groups() const { return shape.frames * windows(); }
    __host__ __device__ int largest_group() const { return window_rows * window_columns; }

    __device__ Group group(int index) const {
        const int frame = index / windows(), window = index % windows();
        const int row = window / windows_across() * window_rows, column = window % windows_across() * window_columns;
        const int rows = min(window_rows, shape.rows - row), columns = min(window_columns, shape.columns - column);
        return {(frame * shape.rows + row) * shape.columns + column, rows * columns, columns, shape.columns};
    }

    // Vectors of eight dimensions of a token's head.
    __device__ const __half* key(int token, int head, int vector) const {
        return at(tensors.key, token, shape.key_stride, head) + vector * Half8::kSize;
    }
    __device__ const __half* value(int token, int head, int vector) const {
        return at(tensors.value, token, shape.value_stride, head) + vector * Half8::kSize;
    }
    __device__ Half8 biased_query(int token, int head, int vector) const {
        Half8 query = load(at(tensors.query, token, shape.query_stride, head), vector * Half8::kSize);
        if (tensors.bias == nullptr) return query;
        const Half8 bias = load(tensors.bias, head * shape.head_dim + vector * Half8::kSize);
#pragma unroll
        for (int i = 0; i < Half8::kSize / 2; ++i) {
            const float2 a = __half22float2(query.at[i]), b = __half22float2(bias.at[i]);
            query.at[i] = __floats2half2_rn(a.x + b.x, a.y + b.y);
        }
        return query;
    }

    // The bias of dimensions d and d + 1 of a head's values. The weights of a row add up to one, so it is added last.
    __device__ float2 value_bias(int head, int d) const {
        if (tensors.bias == nullptr) return make_float2(0.0f, 0.0f);
        const __half* bias = static_cast<const __half*>(tensors.bias) + (2 * shape.heads + head) * shape.head_dim + d;
        return __half22float2(*reinterpret_cast<const __half2*>(bias));
    }

    __device__ __half2* output(int token, int head) const {
        return reinterpret_cast<__half2*>(static_cast<__half*>(tensors.attn_out) +
                                          (static_cast<size_t>(token) * shape.heads + head) * shape.head_dim);
    }

  private:
    __device__ const __half* at(const void* tensor, int token, int stride, int head) const {
        return static_cast<const __half*>(tensor) + static_cast<size_t>(token) * stride + head * shape.head_dim;
    }
};

cudaError_t vision_attention_sm90(const VisionPass& pass, int sms, cudaStream_t stream);

}  // namespace tango
