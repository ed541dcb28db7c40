/* The Tango operator (arXiv 2604.09547) on an NVIDIA GPU: prunes the visual tokens of a video.
 *
 * `tango_prune_enqueue` only launches kernels: it allocates nothing, never synchronizes and reads nothing back. So a
 * CUDA graph can capture it. The same inputs give the same bits on the same GPU. Every function that can fail returns a
 * TangoStatus.
 */
#ifndef TANGO_PRUNE_H
#define TANGO_PRUNE_H

#include "tango/common.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TANGO_MAX_FRAMES 256            /* F */
#define TANGO_MAX_TOKENS_PER_FRAME 1024 /* L */
#define TANGO_MAX_WIDTH 8192            /* D */
#define TANGO_MAX_NEIGHBORS 64          /* k */

typedef enum TangoMergeOrder { TANGO_MERGE_ANCHOR = 0, TANGO_MERGE_DENSITY = 1 } TangoMergeOrder;
typedef enum TangoBudget { TANGO_BUDGET_PAPER = 0, TANGO_BUDGET_EXACT = 1 } TangoBudget;

/* Fast rounds rotated features to fp16 for inner products; exact keeps squared distances to 1e-6. */
typedef enum TangoPrecision { TANGO_FAST = 0, TANGO_EXACT = 1 } TangoPrecision;

/* Ratios and thresholds are integers in ten-thousandths: with fp32 even the default budgets would come out wrong. */
typedef struct TangoPruneParams {
    int32_t retention_ratio;       /* r, 1 to 10000 */
    int32_t context_ratio;         /* c, 0 to 10000 */
    int32_t expansion;             /* alpha, 10000 to 1000000 */
    int32_t anchor_weight;         /* beta, 0 to 10000 */
    int32_t segment_threshold;     /* cosine, -10000 to 10000 */
    int32_t static_threshold;      /* cosine, -10000 to 10000 */
    int32_t neighbors;             /* k, 1 to TANGO_MAX_NEIGHBORS */
    int32_t time_base;             /* above 1 */
    int32_t space_base;            /* above 1 */
    int32_t grid_rows;             /* H */
    int32_t grid_columns;          /* W; H * W = L */
    int32_t merge_order;           /* TangoMergeOrder */
    int32_t budget;                /* TangoBudget */
    int32_t precision;             /* TangoPrecision */
    int32_t sink_count;            /* entries of sink_positions */
    const int32_t* sink_positions; /* host memory, grid positions, read before the call returns; may be null */
} TangoPruneParams;

/* The video: features [frames, tokens_per_frame, width]. */
typedef struct TangoPruneShape {
    int32_t frames;           /* F */
    int32_t tokens_per_frame; /* L */
    int32_t width;            /* D, even */
    int32_t dtype;            /* TangoDtype of features and tokens */
} TangoPruneShape;

/* Device pointers, contiguous, row-major; features and tokens are aligned to 16 bytes. */
typedef struct TangoPruneTensors {
    const void* features;    /* [F, L, D] */
    const float* salience;   /* [F, L] */
    const float* timestamps; /* [F], seconds */
    void* tokens;            /* [capacity, D]; rows past the count are zero */
    int32_t* indices;        /* [capacity], f * L + l ascending; -1 past the count */
    int32_t* count;          /* [1] */
    uint8_t* merged;         /* [capacity], 1 where the token was kept as context; 0 past the count; may be null */
    int32_t* segments;       /* [F, 2], first frame and one past the last; -1 past the last segment; may be null */
} TangoPruneTensors;

/* Sets the defaults of the paper and its authors' code, for a token grid and without sinks: those belong to a model. */
TANGO_API void tango_prune_defaults(int32_t grid_rows, int32_t grid_columns, TangoPruneParams* params);

/* Rows of the fixed-size outputs: min(F L, F L r + 2 F). */
TANGO_API int tango_prune_capacity(const TangoPruneShape* shape, const TangoPruneParams* params, int32_t* capacity);

/* Bytes of device memory that `tango_prune_enqueue` needs as scratch. A workspace that is large enough for a video is
 * large enough for every shorter one. */
TANGO_API int tango_prune_workspace(const TangoPruneShape* shape, const TangoPruneParams* params, size_t* bytes);

/* Enqueues the operator on a stream (a cudaStream_t). `workspace` is aligned to 256 bytes. */
TANGO_API int tango_prune_enqueue(const TangoPruneShape* shape, const TangoPruneParams* params,
                                  const TangoPruneTensors* tensors, void* workspace, size_t workspace_bytes,
                                  void* stream);

#ifdef __cplusplus
}
#endif
#endif
