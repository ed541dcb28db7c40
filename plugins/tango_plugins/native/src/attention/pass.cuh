// A pass of a decoder's attention (tango/attention.h): new tokens, and the cache that they attend to.
#pragma once

#include <climits>

#include "common/check.h"
#include "common/platform.cuh"
#include "tango/attention.h"

namespace tango {

// The argument of its kernels.
struct Pass {
    TangoAttentionShape shape;
    TangoAttentionTensors tensors;

    __host__ __device__ int group_size() const { return shape.heads / shape.kv_heads; }
    __device__ int columns() const { return (shape.heads + 2 * shape.kv_heads) * shape.head_dim; }
    // Position of the last new token, inside the cache whatever the memory says: builders of engines time on any.
    __device__ int last_position() const { return min(max(*tensors.last, shape.tokens - 1), shape.capacity - 1); }
    __device__ int first_position() const { return last_position() + 1 - shape.tokens; }
    // The row of cosines and sines of a new token.
    __device__ int angle_row(int token) const {
        return shape.angles == TANGO_ANGLES_OF_TOKENS ? token : first_position() + token;
    }
};

inline int check_shape(const TangoAttentionShape& shape) {
    if (int status = check_ranges({{"tokens", shape.tokens, 1, shape.capacity},
                                   {"kv_heads", shape.kv_heads, 1, 1 << 10},
                                   {"heads", shape.heads, shape.kv_heads, 1 << 10},
                                   {"head_dim", shape.head_dim, 16, TANGO_MAX_HEAD_DIM},
                                   {"angles", shape.angles, TANGO_ANGLES_OF_POSITIONS, TANGO_ANGLES_OF_TOKENS}}))
        return status;
    return check_ranges({{"heads % kv_heads", shape.heads % shape.kv_heads, 0, 0},
                         {"head_dim % 16", shape.head_dim % 16, 0, 0},
                         {"tokens * heads", 1LL * shape.tokens * shape.heads, 1, INT_MAX / 256}});
}

// Attention by Hopper's warpgroups, of head_dim 64 and 128, once the cache has the new tokens. Their queries are where
// its output will be: rotated, and scaled for a softmax in base 2.
cudaError_t prefill_attention_sm90(const Pass& pass, int sms, cudaStream_t stream);

}  // namespace tango
