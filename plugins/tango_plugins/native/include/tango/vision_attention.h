/* Attention of a vision tower on an NVIDIA GPU: the patches of a frame attend to each other, in both directions, over
 * the whole frame or inside windows, whose queries and keys it can rotate. One kernel; a CUDA graph can capture it.
 */
#ifndef TANGO_VISION_ATTENTION_H
#define TANGO_VISION_ATTENTION_H

#include "tango/common.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TANGO_MAX_VISION_HEAD_DIM 128
#define TANGO_MAX_VISION_WINDOW 1024
#define TANGO_MAX_ROTATED_WINDOW 64

/* A frame is a grid of patches, which are its tokens, row by row: T = rows columns. A window w > 0 cuts the grid into
 * w x w patches, from its first patch on; the last windows of a row or column may be smaller. A token attends to all
 * tokens of its window. With window 0 it attends to all tokens of its frame. */
typedef struct TangoVisionAttentionShape {
    int32_t frames;       /* F */
    int32_t rows;         /* of a frame's grid */
    int32_t columns;      /* of a frame's grid */
    int32_t heads;        /* H */
    int32_t head_dim;     /* d: a multiple of 8, at most TANGO_MAX_VISION_HEAD_DIM */
    int32_t window;       /* w, in patches, at most TANGO_MAX_VISION_WINDOW; 0: the whole frame */
    int32_t query_stride; /* elements from a token's queries to the next one's: a multiple of 8, H d to 2^31 / T */
    int32_t key_stride;   /* as query_stride */
    int32_t value_stride; /* as query_stride */
} TangoVisionAttentionShape;

/* Device memory aligned to 16 bytes, fp16 but for the angles. A frame follows the one before it without a gap. So one
 * tensor [F, T, 3 H d] holds all three: `key` and `value` are H d and 2 H d elements after `query`, every stride is
 * 3 H d. Each bias is added to the tensor of its name, and may be null.
 *
 * With cosines and sines, queries and keys are rotated as by tango/patch_rotation.h, to the same bits. Then d is a
 * multiple of 16, and a window has up to TANGO_MAX_ROTATED_WINDOW patches, as has a frame that is smaller than one. */
typedef struct TangoVisionAttentionTensors {
    const void* query;      /* [F, T, H d], rows query_stride apart */
    const void* key;        /* [F, T, H d], rows key_stride apart */
    const void* value;      /* [F, T, H d], rows value_stride apart */
    const void* query_bias; /* [H d] */
    const void* key_bias;   /* [H d] */
    const void* value_bias; /* [H d] */
    const float* cosines;   /* [T, d / 2] of each patch's angles; null, and sines too: nothing is rotated */
    const float* sines;     /* as cosines */
    void* attn_out;         /* [F, T, H d], contiguous, written */
} TangoVisionAttentionTensors;

/* Enqueues softmax(q k^T / sqrt(d)) v on a stream (a cudaStream_t) and returns a TangoStatus. Scores, softmax and
 * accumulators are fp32; a query with its bias, a rotated query or key, and the softmax weights, are rounded to fp16
 * for the products. The bias of keys that are not rotated adds the same to all scores of a query, and changes no
 * weight: it is not read, so that it overflows nothing. The same inputs give the same bits on the same GPU. */
TANGO_API int tango_vision_attention_enqueue(const TangoVisionAttentionShape* shape,
                                             const TangoVisionAttentionTensors* tensors, void* stream);

#ifdef __cplusplus
}
#endif
#endif
