// What every kernel is given: the operator's parameters and the intermediate results, all device pointers.
//
// Which tokens are candidates, context or anchors is known on the device alone. So every array has room for the worst
// case, every grid covers it, and kernels read from these arrays how much of it there is.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "tango/prune.h"

namespace tango {

// Rotated features are held in fp16, times this power of two: small components stay clear of subnormal numbers.
constexpr float kRotatedScale = 4096.0f;
constexpr float kGramScale = 1.0f / (kRotatedScale * kRotatedScale);

constexpr int kTile = 128;     // rows and columns of a tile of the Gram matrix
constexpr int kSliceK = 64;    // its step along D; rotated rows are padded to a multiple of it
constexpr int kChunk = 32;     // member rows summed at once in a merge

// Why a token is in the output. The order matters to the exact budget: later ones are dropped first.
enum Kind : uint8_t { kUnkept = 0, kSelected, kAdded, kUnmerged, kMerged };

// One step 3 segment: frames [first, last).
struct Segment {
    int first, last;
    int static_positions;  // |S|
    int context;           // b of the merge over the dynamic part (or over the only frame)
    int static_context;    // b of the merge over the static part
};

// Tokens that `select` looks at together. Pool f < F: frame f, or its dynamic part; pool F + s: the static part of
// segment s.
struct SelectPool {
    int count;       // tokens
    int salient;     // m_s
    int candidates;  // min(floor(alpha m_s), count)
};

// Tokens that `merge` looks at together. Pool s < F: segment s; pool F + s: its static part. No tokens: nothing to
// merge.
struct MergePool {
    int first;       // of its entries in the context list
    int count;
    int anchors;     // b
    int frames;      // rows of X behind each token: those that a static token averages, else 1
    int member_row;  // first of its rows in `members`
    int anchor_row;  // first of its anchors in `anchor_slot`
    int aligned;     // where its `norm` and `spread` begin: a multiple of 4
};

// 128 rows of one merge pool.
struct TileRow {
    int pool;
    int index;  // rows [128 index, 128 index + 128) of the pool
};

struct Job {
    // Parameters
    int F, L, D, N, W;             // N = F L
    int padded_D;                  // D rounded up to kSliceK
    int ld;                        // row length of the Gram matrix, N rounded up
    int candidate_ld;              // row length of the candidates' Gram matrices
    int neighbors;
    int capacity, exact_count;
    double retention, context_ratio, expansion, anchor_weight, segment_threshold, static_threshold;
    double time_base, space_base;
    bool density_order, exact_budget, exact_products, half_features;
    uint32_t sinks[TANGO_MAX_TOKENS_PER_FRAME / 32];  // bit set of grid positions

    // How the Gram matrix is worked through: all of it at once, or in strips of rows, each computed when needed.
    int strips, strip_tile_rows, max_tile_rows;
    int select_batch;  // frames whose candidates' Gram matrices are held at once

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
    __half* rotated_high;      // [N, padded_D]
    __half* rotated_low;       // [N, padded_D], what rounding to fp16 left; null unless exact_products
    float2* turns;             // (cos, sin) of the rotation: [F, time], [H, space], [W, space]
    float* cosines;            // [F - 1, L]
    uint16_t* static_run;      // [F, L], frames for which the position has been static
    int* unchanged;            // [F, F], row e: positions unchanged for at least q steps before frame e (long videos)
    Segment* segment;          // [F]
    int* frame_segment;        // [F]
    int* segment_count;        // [1]
    // Steps 4 to 6
    SelectPool* select_pool;   // [2 F]
    int* candidates;           // [N], tokens by falling salience, from candidate_base(pool)
    int* chosen;               // [2 F], tokens that each pool selected
    uint8_t* kind;             // [N], Kind of each token
    // Steps 7 and 8, by entry of the context list
    MergePool* merge_pool;     // [2 F]
    int* context_count;        // [1]
    int* context;              // [N], token of each entry, by pool, ascending
    int* entry_pool;           // [N]
    TileRow* tile_row;         // [max_tile_rows]
    int* tile_rows;            // [1]
    int* member_count;         // [1], rows in `members`
    float* gram;               // [rows of a strip, ld] inner products of a pool's entries
    float* norm;               // [N + 16 F], diagonal of the Gram matrices, from MergePool::aligned
    float* spread;             // [N + 16 F], mean of the k smallest squared distances; density = exp(-spread)
    float* widest;             // [2 F], largest squared distance of each merge pool
    float* score;              // [N], density * delta
    int* anchors;              // [N], entry within the pool, by falling score, from MergePool::first
    int* anchor_tokens;        // [N], the same as tokens
    int* anchor_slot;          // [N], place in `anchors` of every pool's anchors, one after the other
    int* anchor_count;         // [1]
    int* owner;                // [N], the anchor (entry within the pool) that the entry joins
    int* member_rows;          // [N], rows of X that joined the anchor at this entry
    int* member_start;         // [N], where they begin in `members`
    int* members;              // [N], rows of X, grouped by anchor
    int* member_anchor;        // [N], entry of the anchor that each belongs to
    float* chunk_sum;          // [N / kChunk, D], sums of those chunks of members that have one anchor
    // Outputs, by token
    int* source;               // [N], for kMerged: entry of the anchor whose merge stands here
    float* worth;              // [N], what the exact budget goes by
    int* kept;                 // [1]
    uint8_t* verdict;          // [N], Kind after the exact budget

    __host__ __device__ int time_pairs() const { return (D - 4 * (D / 6)) / 2; }
    __host__ __device__ int space_pairs() const { return D / 6; }
    __host__ __device__ int H() const { return L / W; }
};

// The kernels, in the order in which they run; each checks nothing and launches on `stream`.
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

// Which entries of a pool's tokens a Gram matrix pairs with which.
enum class Pairs {
    kSymmetric,  // all of a pool with each other, each pair once and written twice
    kStrip,      // the rows of one strip with all of their pool
    kDiagonal,   // each entry with itself
    kAnchors     // the rows of one strip with the anchors of their pool
};
cudaError_t gram(const Job& job, Pairs pairs, int strip, cudaStream_t stream);

}  // namespace tango
