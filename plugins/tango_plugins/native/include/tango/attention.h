/* Attention of a prefill on an NVIDIA GPU: several tokens attend to a KV cache, which their keys and values are
 * appended to. Causal, with grouped queries (GQA) and rotary embedding. Two kernels; a CUDA graph can capture them.
 */
#ifndef TANGO_ATTENTION_H
#define TANGO_ATTENTION_H

#include "tango/common.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TANGO_MAX_HEAD_DIM 256

/* Whose angles the rows of cosines and sines are. */
typedef enum TangoAngles {
    TANGO_ANGLES_OF_POSITIONS = 0, /* of every position: a token's row is its position */
    TANGO_ANGLES_OF_TOKENS = 1 /* of the new tokens, where a token's rotary position is not its place in the cache */
} TangoAngles;

typedef struct TangoAttentionShape {
    int32_t tokens;   /* new tokens, T */
    int32_t heads;    /* query heads, H: a multiple of kv_heads */
    int32_t kv_heads; /* KV heads, G */
    int32_t head_dim; /* d: a multiple of 16, at most TANGO_MAX_HEAD_DIM */
    int32_t capacity; /* positions that the cache can hold, P */
    int32_t angles;   /* a TangoAngles */
} TangoAttentionShape;

/* Contiguous device memory, fp16 unless noted; all but `last` is aligned to 16 bytes. The rotary embedding pairs
 * dimensions i and d / 2 + i of a head. Cosine and sine of a pair's angle are at [row, i] of the token's row. */
typedef struct TangoAttentionTensors {
    const void* qkv;     /* [T, (H + 2 G) d]: query, key and value of each token, without bias */
    const void* bias;    /* [(H + 2 G) d], added to them */
    const int32_t* last; /* [1] int32, position of the last token, from T - 1 to P - 1 */
    const void* cosines; /* [at least P, d / 2], or [T, d / 2] of tokens */
    const void* sines;   /* as cosines */
    void* keys;          /* [G, P, d]: rows up to `last` - T are read, the next T are written */
    void* values;        /* as keys */
    void* attn_out;      /* [T, H d], written */
} TangoAttentionTensors;

/* Enqueues it on a stream (a cudaStream_t) and returns a TangoStatus. Scores, softmax and accumulators are fp32; the
 * softmax weights are rounded to fp16 for their product with the values. */
TANGO_API int tango_attention_enqueue(const TangoAttentionShape* shape, const TangoAttentionTensors* tensors,
                                      void* stream);

/* The attention weights of the last token for each position of the cache in each head: `shares`, fp32 [H, P], 0 after
 * that token. Of the tensors it reads qkv, bias, last, cosines, sines and keys, which already include those of the new
 * tokens. One kernel; it returns a TangoStatus. */
TANGO_API int tango_attention_shares_enqueue(const TangoAttentionShape* shape, const TangoAttentionTensors* tensors,
                                             float* shares, void* stream);

#ifdef __cplusplus
}
#endif
#endif
