/* One step of decoding on an NVIDIA GPU: a Qwen2 decoder takes one token and gives the logits of the next.
 *
 * A step reads every weight once and computes next to nothing, so its time is that of the memory. All of it is one
 * kernel, whose blocks stay on their multiprocessors from the first layer to the head and fetch what the next product
 * needs while they wait for each other. The same inputs give the same bits on the same GPU.
 */
#ifndef TANGO_DECODE_H
#define TANGO_DECODE_H

#include "tango/prune.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Dimensions. All widths of matrices are multiples of 16. */
typedef struct TangoDecodeShape {
    int32_t layers;
    int32_t width;        /* D, of embeddings */
    int32_t heads;        /* a multiple of kv_heads */
    int32_t kv_heads;     /* of the key/value cache */
    int32_t head_width;   /* of one head, at most 256 */
    int32_t intermediate; /* of the MLP */
    int32_t vocabulary;   /* logits that are computed */
    int32_t head_columns; /* columns of the head's matrix, at least as many; the others are padding */
    int32_t capacity;     /* positions of the cache */
    int32_t blocks;       /* thread blocks, at most as many as multiprocessors; 0: as many */
    float norm_eps;
} TangoDecodeShape;

/* One layer, all of it in device memory and aligned to 16 bytes, as is the array. Matrices are fp16 [in, out]. */
typedef struct TangoDecodeLayer {
    const float* attention_norm; /* [width] */
    const void* qkv;             /* [width, (heads + 2 kv_heads) head_width]: query, key and value side by side */
    const void* qkv_bias;        /* fp16, as many */
    const void* out;             /* [heads head_width, width] */
    const float* mlp_norm;       /* [width] */
    const void* gate;            /* [width, intermediate] */
    const void* up;              /* likewise */
    const void* down;            /* [intermediate, width] */
    void* keys;                  /* fp16 [kv_heads, capacity, head_width], rotated */
    void* values;                /* likewise, not rotated */
} TangoDecodeLayer;

typedef struct TangoDecodeTensors {
    const TangoDecodeLayer* layers; /* [layers], in device memory itself */
    const float* frequencies;       /* [head_width / 2], of the rotary embedding: radians a position */
    const float* norm;              /* [width] */
    const void* head;               /* fp16 [width, head_columns] */
    const void* embedding;          /* fp16 [width], of the token */
    float* logits;                  /* [vocabulary], written */
} TangoDecodeTensors;

/* Bytes of device memory that `tango_decode_enqueue` needs on the current device. */
TANGO_API int tango_decode_workspace(const TangoDecodeShape* shape, size_t* bytes);

/* Enqueues a step on a stream (a cudaStream_t): one cooperative kernel, which takes the whole GPU.
 *
 * `position` is that of the token, from 0 to capacity - 1: cache rows before it are read, row `position` is written.
 * `workspace` is aligned to 256 bytes, zero before the first step, and left alone between steps. */
TANGO_API int tango_decode_enqueue(const TangoDecodeShape* shape, const TangoDecodeTensors* tensors, int32_t position,
                                   void* workspace, size_t workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif
#endif
