// The argument of every kernel: the operator's parameters, and device pointers to inputs, outputs and intermediate
// results.
//
// Only the device knows which tokens are candidates, context or anchors. So every array has room for the worst case,
// every grid covers it, and kernels read the actual counts from these arrays.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "tango/prune.h"

namespace tango {

// Rotated features are stored in fp16, times this power of two, so that small components are not subnormal.
constexpr float kRotatedScale = 4096.0f;
constexpr float kGramScale = 1.0f / (kRotatedScale * kRotatedScale);

constexpr int kTile = 128;            // rows and columns of a Gram tile
constexpr int kSliceK = 64;           // rotated rows are padded to a multiple of this many columns
constexpr int kChunk = 32;            // member rows that one block sums in a merge
constexpr int kRowUnit = 32;          // rows of a Gram matrix have a multiple of so many products
constexpr int kMaxPackedRows = 1024;  // tile rows whose prefix sums fit into shared memory

// Why a token is in the output. The exact budget drops later kinds first.
enum Kind : uint8_t { kUnkept = 0, kSelected, kAdded, kUnmerged, kMerged };

// A segment of step 3: frames [first, last).
struct Segment {
    int first, last;
    int static_positions;  // |S|
    int context;           // b of the merge over the dynamic part, or over the only frame
    int static_context;    // b of the merge over the static part
};

// Tokens that `select` handles together. Pool f < F is frame f, or its dynamic part. Pool F + s is the static part of
// segment s.
struct SelectPool {
    int count;       // tokens
    int salient;     // m_s
    int candidates;  // min(floor(alpha m_s), count)
};

// Tokens that `merge` handles together. Pool s < F is segment s, pool F + s its static part. A pool without tokens has
// nothing to merge.
struct MergePool {
    int first;  // index of its entries in the context list
    int count;
    int anchors;     // b
    int frames;      // rows of X per token: those that a static token averages, else 1
    int member_row;  // index of its first row in `members`
    int anchor_row;  // index of its first anchor in `anchor_slot`
    int aligned;     // where its `norm` and `knn_mean_sq_dist` begin: a multiple of 4
    int ld;          // row length of its Gram matrix
    int gram;        // where that begins, if the matrices are packed
};

// 128 rows of a merge pool.
struct TileRow {
    int pool;
    int index;  // rows [128 index, 128 index + 128) of the pool
};

struct Job {
    // Parameters
    int F, L, D, N, W;  // N = F L
    int padded_D;       // D rounded up to kSliceK
    int ld;             // row length of a Gram matrix of all tokens, and of a strip: N rounded up
    int candidate_ld;   // row length of the candidates' Gram matrices
    int neighbors;
    int capacity, exact_count;
    double retention, context_ratio, expansion, anchor_weight, segment_threshold, static_threshold;
    double time_base, space_base;
    bool density_order, exact_budget, exact_products, half_features;
    uint32_t sinks[TANGO_MAX_TOKENS_PER_FRAME / 32];  // bit set of grid positions

    // If the pools' Gram matrices fit, they are packed and computed once. Else they are computed in strips of rows,
    // each when it is needed. With one strip they always fit.
    int strips, strip_tile_rows, max_tile_rows;
    int gram_size;     // products that there is room for
    int select_batch;  // frames whose candidates' Gram matrices are in memory at once

    // Inputs and outputs
    const void* features;
    const float* salience;
    const float* timestamps;
    void* tokens;
    int* indices;
    int* count;
    uint8_t* merged;
    int* segments;

    // Steps 1 to 3
    __half* rotated_high;  // [N, padded_D]
    __half* rotated_low;   // [N, padded_D], the rounding error of rotated_high; null unless exact_products
    float2* rope_cos_sin;  // (cos, sin) of the rotation: [F, time], [H, space], [W, space]
    float* cosines;        // [F - 1, L]
    uint16_t* static_run;  // [F, L], frames since the position last changed
    int* unchanged;        // [F, F], row e: positions unchanged for at least q steps before frame e (long videos)
    Segment* segment;      // [F]
    int* frame_segment;    // [F]
    int* segment_count;    // [1]
    // Steps 4 to 6
    SelectPool* select_pool;  // [2 F]
    int* candidates;          // [N], tokens by descending salience, from candidate_base(pool)
    int* chosen;              // [2 F], number of tokens that each pool selected
    uint8_t* kind;            // [N], Kind of each token
    // Steps 7 and 8, by entry of the context list
    MergePool* merge_pool;    // [2 F]
    int* context_count;       // [1]
    int* context;             // [N], token of each entry, by pool, ascending
    int* entry_pool;          // [N]
    TileRow* tile_row;        // [max_tile_rows]
    int* tile_rows;           // [1]
    int* packed;              // [1], whether the Gram matrices are
    int* member_count;        // [1], rows in `members`
    float* gram;              // [gram_size], inner products of the pools' entries
    float* norm;              // [N + 16 F], diagonal of the Gram matrices, from MergePool::aligned
    float* knn_mean_sq_dist;  // [N + 16 F], mean of the k smallest squared distances; density = exp(-knn_mean_sq_dist)
    float* max_sq_dist;       // [2 F], largest squared distance of each merge pool
    float* score;             // [N], density * delta
    int* anchors;             // [N], entry within the pool, by descending score, from MergePool::first
    int* anchor_tokens;       // [N], the tokens of `anchors`
    int* anchor_slot;         // [N], index in `anchors` of every pool's anchors, contiguous over the pools
    int* anchor_count;        // [1]
    int* owner;               // [N], anchor (entry within the pool) that the entry joins
    int* member_rows;         // [N], number of rows of X that joined the anchor at this entry
    int* member_start;        // [N], index of the first one in `members`
    int* members;             // [N], rows of X, grouped by anchor
    int* member_anchor;       // [N], entry of the anchor of each row in `members`
    float* chunk_sum;         // [N / kChunk, D], sums of the chunks whose members share one anchor
    // Outputs, by token
    int* source;          // [N], for kMerged: entry of the anchor whose merged row is written here
    float* priority;      // [N], by which the exact budget keeps tokens
    int* kept;            // [1], tokens before the exact budget
    uint8_t* final_kind;  // [N], Kind after the exact budget

    __host__ __device__ int time_pairs() const { return (D - 4 * (D / 6)) / 2; }
    __host__ __device__ int space_pairs() const { return D / 6; }
    __host__ __device__ int H() const { return L / W; }
};

// The steps in order. Each launches kernels on `stream`, and checks nothing.
cudaError_t rotate(const Job& job, cudaStream_t stream);
cudaError_t find_segments(const Job& job, cudaStream_t stream);
cudaError_t find_candidates(const Job& job, cudaStream_t stream);
cudaError_t select(const Job& job, cudaStream_t stream);
cudaError_t list_context(const Job& job, cudaStream_t stream);
cudaError_t find_densities(const Job& job, cudaStream_t stream);
cudaError_t find_deltas(const Job& job, cudaStream_t stream);
cudaError_t find_anchors(const Job& job, cudaStream_t stream);
cudaError_t find_owners(const Job& job, cudaStream_t stream);
cudaError_t merge(const Job& job, cudaStream_t stream);

// Which entries of a pool a Gram matrix pairs.
enum class Pairs {
    kSymmetric,  // packed: all of a pool with each other; each pair is computed once and stored twice
    kStrip,      // the rows of a strip with all of their pool
    kDiagonal,   // each entry with itself
    kAnchors     // the rows of a strip with the anchors of their pool
};
// Only the device knows whether the matrices are packed: what is not needed then returns at once.
cudaError_t gram(const Job& job, Pairs pairs, int strip, cudaStream_t stream);

}  // namespace tango
