/* Attention of a pass of tokens over a cache of keys and values, which theirs are appended to: grouped queries, rotary
 * angles, each token attends to itself and to those before it. Two kernels, which a CUDA graph can capture.
 */
#ifndef TANGO_ATTENTION_H
#define TANGO_ATTENTION_H

#include <stdint.h>

#include "tango/prune.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TANGO_MAX_HEAD_WIDTH 256

typedef struct TangoAttentionShape {
    int32_t tokens;     /* of the pass, T */
    int32_t heads;      /* of the queries, H: a multiple of kv_heads */
    int32_t kv_heads;   /* of the cache, G */
    int32_t head_width; /* of one head, d: a multiple of 16, at most TANGO_MAX_HEAD_WIDTH */
    int32_t capacity;   /* positions that the cache has room for, P */
} TangoAttentionShape;

/* Device memory, contiguous, fp16 unless it is said; all but `last` aligned to 16 bytes. A head is rotated by halves:
 * its dimensions i and d / 2 + i together, by the angle whose cosine and sine are at [position, i]. */
typedef struct TangoAttentionTensors {
    const void* packed;  /* [T, (H + 2 G) d]: queries, keys and values of each token */
    const void* bias;    /* [(H + 2 G) d], added to them */
    const int32_t* last; /* [1] int32, the position of the last token: T - 1 to P - 1 */
    const void* cosines; /* [P, d / 2] or longer */
    const void* sines;   /* likewise */
    void* keys;          /* [G, P, d]: rows up to `last` - T are read, the T behind them are written */
    void* values;        /* likewise */
    void* mixed;         /* [T, H d], written: the values, mixed */
} TangoAttentionTensors;

/* Enqueues it on a stream (a cudaStream_t). Scores, softmax and sums are fp32; weights are rounded to fp16 before they
 * multiply values. */
TANGO_API int tango_attention_enqueue(const TangoAttentionShape* shape, const TangoAttentionTensors* tensors,
                                      void* stream);

#ifdef __cplusplus
}
#endif
#endif
