// FlashAttention (arXiv 2205.14135 and 2307.08691) on mma.sync: what a warp does with its query rows and one tile of
// keys and values in shared memory. Of each row it keeps the maximum score, the sum of the weights and the weighted sum
// of the values.
//
// A kernel's tile T says how much that is: kFragments of 16 query rows per warp, kKeys keys, kWidth dimensions, and
// offset(row, vector), the place of 16 bytes of a row in shared memory.
#pragma once

#include "common/platform.cuh"

namespace tango {

constexpr float kLog2E = 1.4426950408889634f;  // softmax is computed in base 2

struct alignas(16) Half8 {
    static constexpr int kSize = 8;
    __half2 at[kSize / 2];
};

// Half8 from and to memory at once: __half2 is not trivially copyable, so its members would be copied one by one.
__device__ inline Half8 load(const void* from) {
    const uint4 bits = *static_cast<const uint4*>(from);
    return reinterpret_cast<const Half8&>(bits);
}

__device__ inline void store(void* to, const Half8& vector) {
    *static_cast<uint4*>(to) = reinterpret_cast<const uint4&>(vector);
}

__device__ inline Half8 load(const void* from, size_t index) { return load(static_cast<const __half*>(from) + index); }

__device__ inline void store(void* to, size_t index, const Half8& vector) {
    store(static_cast<__half*>(to) + index, vector);
}

__device__ inline uint32_t pack(float a, float b) {
    const __half2 pair = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// Over the four lanes that have the same rows of a fragment.
__device__ inline float quad_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
    return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}

__device__ inline float quad_sum(float value) {
    value += __shfl_xor_sync(kAllLanes, value, 1);
    return value + __shfl_xor_sync(kAllLanes, value, 2);
}

// A warp's running softmax state and output. Of each fragment a thread has two rows: its lane / 4, and that + 8.
template <typename T>
struct RowState {
    float attn_out[T::kFragments][T::kWidth / 8][4] = {};
    float row_max[T::kFragments][2], row_sum[T::kFragments][2] = {};

    __device__ RowState() {
#pragma unroll
        for (int m = 0; m < T::kFragments; ++m) row_max[m][0] = row_max[m][1] = -INFINITY;
    }
};

template <typename T>
using Scores = float[T::kFragments][T::kKeys / 8][4];

template <typename T>
__device__ inline void compute_qk(Scores<T>& scores, SharedAddress queries, SharedAddress keys, int row) {
    const int lane = lane_id();
    const int query = row + lane % 16, key = lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < T::kWidth / 16; ++k) {
        uint32_t a[T::kFragments][4];
#pragma unroll
        for (int m = 0; m < T::kFragments; ++m)
            load_matrices(a[m], queries + T::offset(query + 16 * m, 2 * k + lane / 16));
#pragma unroll
        for (int n = 0; n < T::kKeys / 16; ++n) {
            uint32_t b[4];
            load_matrices(b, keys + T::offset(16 * n + key, 2 * k + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < T::kFragments; ++m) {
                mma(scores[m][2 * n], a[m], {b[0], b[1]});
                mma(scores[m][2 * n + 1], a[m], {b[2], b[3]});
            }
        }
    }
}

// Turns scores, which are yet to be multiplied by `scale`, into weights relative to the new row maximum, and rescales
// the state to it.
template <typename T>
__device__ inline void update_softmax(Scores<T>& scores, RowState<T>& rows, float scale) {
#pragma unroll
    for (int m = 0; m < T::kFragments; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float row_max = rows.row_max[m][i];
#pragma unroll
            for (int n = 0; n < T::kKeys / 8; ++n)
                row_max = fmaxf(row_max, fmaxf(scores[m][n][2 * i], scores[m][n][2 * i + 1]));
            row_max = quad_max(row_max);
            const float rescale = exp2_fast((rows.row_max[m][i] - row_max) * scale);
            rows.row_max[m][i] = row_max;
            float row_sum = 0.0f;
#pragma unroll
            for (int n = 0; n < T::kKeys / 8; ++n)
#pragma unroll
                for (int j = 2 * i; j < 2 * i + 2; ++j) {
                    scores[m][n][j] = exp2_fast(fmaf(scores[m][n][j], scale, -row_max * scale));
                    row_sum += scores[m][n][j];
                }
            rows.row_sum[m][i] = rows.row_sum[m][i] * rescale + row_sum;
#pragma unroll
            for (int n = 0; n < T::kWidth / 8; ++n) {
                rows.attn_out[m][n][2 * i] *= rescale;
                rows.attn_out[m][n][2 * i + 1] *= rescale;
            }
        }
}

template <typename T>
__device__ inline void accumulate_pv(RowState<T>& rows, const Scores<T>& weights, SharedAddress values) {
    const int lane = lane_id();
#pragma unroll
    for (int k = 0; k < T::kKeys / 16; ++k) {
        uint32_t a[T::kFragments][4];
#pragma unroll
        for (int m = 0; m < T::kFragments; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float (&pair)[4] = weights[m][2 * k + i / 2];
                a[m][i] = pack(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
            }
#pragma unroll
        for (int n = 0; n < T::kWidth / 16; ++n) {
            uint32_t b[4];
            load_transposed(b, values + T::offset(16 * k + lane % 16, 2 * n + lane / 16));
#pragma unroll
            for (int m = 0; m < T::kFragments; ++m) {
                mma(rows.attn_out[m][2 * n], a[m], {b[0], b[1]});
                mma(rows.attn_out[m][2 * n + 1], a[m], {b[2], b[3]});
            }
        }
    }
}

}  // namespace tango
