/* One decode step on an NVIDIA GPU: a Qwen2 decoder takes one token and returns the logits of the next one.
 *
 * A step reads every weight once and computes little, so memory bandwidth bounds it. The whole step is one kernel. Its
 * blocks stay on their SMs from the first layer to the LM head, and prefetch the next weights while they wait for each
 * other. The same inputs give the same bits on the same GPU.
 */
#ifndef TANGO_DECODE_H
#define TANGO_DECODE_H

#include "tango/argmax.h"
#include "tango/common.h"
#include "tango/linear.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What the matrices of a decoder are. One format for all makes a faster kernel. */
typedef enum TangoDecodeFormats {
    TANGO_DECODE_FP16 = 0,
    TANGO_DECODE_MIXED = 1,   /* any formats, from matrix to matrix */
    TANGO_DECODE_BLOCKS_4 = 2 /* TANGO_WEIGHTS_BLOCKS_4, with or without zero points */
} TangoDecodeFormats;

/* Dimensions; hidden_size, head_dim, intermediate and head_columns are multiples of 16. */
typedef struct TangoDecodeShape {
    int32_t layers;
    int32_t hidden_size;  /* D */
    int32_t heads;        /* query heads, a multiple of kv_heads */
    int32_t kv_heads;     /* heads of the KV cache */
    int32_t head_dim;     /* at most 256 */
    int32_t intermediate; /* width of the MLP */
    int32_t vocabulary;   /* logits to compute */
    int32_t head_columns; /* columns of the LM head's matrix, at least vocabulary; the rest is padding */
    int32_t capacity;     /* positions of the KV cache */
    int32_t blocks;       /* thread blocks, at most one per SM; 0: one per SM */
    int32_t formats;      /* a TangoDecodeFormats */
    float norm_eps;
} TangoDecodeShape;

/* One layer. Its tensors, and the array of layers, are device memory aligned to 16 bytes. Matrices are [in, out]; gate
 * and up have one format, and blocks of one size. */
typedef struct TangoDecodeLayer {
    TangoMatrix qkv;             /* [hidden_size, (heads + 2 kv_heads) head_dim]: query, key and value */
    TangoMatrix out;             /* [heads head_dim, hidden_size] */
    TangoMatrix gate;            /* [hidden_size, intermediate] */
    TangoMatrix down;            /* [intermediate, hidden_size] */
    TangoMatrix up;              /* [hidden_size, intermediate] */
    const float* attention_norm; /* [hidden_size] */
    const void* qkv_bias;        /* fp16 [(heads + 2 kv_heads) head_dim] */
    const float* mlp_norm;       /* [hidden_size] */
    void* keys;                  /* fp16 [kv_heads, capacity, head_dim], rotated */
    void* values;                /* fp16 [kv_heads, capacity, head_dim], not rotated */
    const void* padding;         /* to a multiple of 16 bytes */
} TangoDecodeLayer;

typedef struct TangoDecodeTensors {
    const TangoDecodeLayer* layers; /* [layers], an array in device memory */
    const float* frequencies;       /* [head_dim / 2] of the rotary embedding, radians per position */
    const float* norm;              /* [hidden_size] */
    TangoMatrix head;               /* [hidden_size, head_columns], the LM head */
    const void* embedding;          /* fp16 [hidden_size] of the token */
    float* logits;                  /* [vocabulary], written */
    TangoArgmax* best;              /* the greatest logit, written; or null. Also pinned host memory */
} TangoDecodeTensors;

/* Bytes of device memory that `tango_decode_enqueue` needs on the current device. Returns a TangoStatus. */
TANGO_API int tango_decode_workspace(const TangoDecodeShape* shape, size_t* bytes);

/* Enqueues a step on a stream (a cudaStream_t) as one cooperative kernel; returns a TangoStatus.
 *
 * `position` is the token's row in the KV cache, from 0 to capacity - 1: the step reads the rows before it and writes
 * row `position`. `rotation` is the position of its rotary angles, from 0 to 2^24: equal to `position`, unless the
 * model numbers its tokens otherwise, as M-RoPE does. `workspace` is aligned to 256 bytes, zero before the first step,
 * and untouched between steps. */
TANGO_API int tango_decode_enqueue(const TangoDecodeShape* shape, const TangoDecodeTensors* tensors, int32_t position,
                                   int32_t rotation, void* workspace, size_t workspace_bytes, void* stream);

/* Embeddings from which a token found on the device gets its own. Host memory, except for `embedding`. */
typedef struct TangoDecodeWords {
    const void* table;   /* fp16 [words, hidden_size] */
    void* row;           /* fp16 [hidden_size], pinned, aligned to 16 bytes: the token's row on its way to the device */
    uint32_t* mail;      /* [2], pinned, zero before the first call: number of the row, and whether no step follows */
    void* embedding;     /* fp16 [hidden_size], device memory, aligned to 16 bytes: where it goes */
    const int32_t* stop; /* [stops], tokens that no step follows; null if there are none */
    int32_t words;       /* at least 1 */
    int32_t stops;
} TangoDecodeWords;

/* Enqueues the step of the token that the work of a stream finds, and waits for that work. The step is enqueued before
 * the token is known, behind a kernel of one block that waits for its embedding, which this call sends when the work is
 * done. So the GPU goes on before the caller looks at the token, and no launch is between two steps. Returns a
 * TangoStatus.
 *
 * `found` is host memory into which that work writes the token, such as the index of `best` of the step before, in
 * pinned memory; a step of the same sequence that this call enqueues should have another `best`.
 * `*token` becomes the token whose step was enqueued; -1 if the one found ends the sequence or has no embedding, so
 * that the step does nothing. The embedding of `tensors` does not count. `words` is of one stream. Everything else is
 * as of tango_decode_enqueue. A CUDA graph cannot capture it. */
TANGO_API int tango_decode_next(const TangoDecodeShape* shape, const TangoDecodeTensors* tensors, int32_t position,
                                int32_t rotation, const TangoDecodeWords* words, const int32_t* found, int32_t* token,
                                void* workspace, size_t workspace_bytes, void* stream);

/* Sequences of one batched step, at most. */
#define TANGO_DECODE_SEQUENCES 8

/* Keys and values of one layer of one sequence, in device memory aligned to 16 bytes. */
typedef struct TangoDecodeCache {
    void* keys;   /* fp16 [kv_heads, capacity, head_dim], rotated */
    void* values; /* fp16 [kv_heads, capacity, head_dim], not rotated */
} TangoDecodeCache;

/* A sequence of a batched step. Each has memory of its own. */
typedef struct TangoDecodeSequence {
    const TangoDecodeCache* caches; /* [layers], an array in device memory aligned to 16 bytes */
    const void* embedding;          /* fp16 [hidden_size] of its token */
    float* logits;                  /* [vocabulary], written */
    int32_t capacity;               /* positions of its KV cache */
    int32_t position;               /* as of tango_decode_enqueue */
    int32_t rotation;               /* as of tango_decode_enqueue */
    int32_t padding;
} TangoDecodeSequence;

/* Bytes of device memory that `tango_decode_batch_enqueue` needs on the current device. Returns a TangoStatus. */
TANGO_API int tango_decode_batch_workspace(const TangoDecodeShape* shape, size_t* bytes);

/* Enqueues a step of several sequences, which reads the weights once, as one cooperative kernel; returns a TangoStatus.
 *
 * `sequences` [count] is host memory, count from 1 to TANGO_DECODE_SEQUENCES. What they bring of their own does not
 * count in the shape and the tensors: capacity, embedding, logits, best, and the layers' keys and values.
 *
 * A sequence's logits and rows have the same bits whatever the other sequences are, how many there are, and at which
 * index it is. They differ from those of tango_decode_enqueue by rounding: sums have another order. */
TANGO_API int tango_decode_batch_enqueue(const TangoDecodeShape* shape, const TangoDecodeTensors* tensors,
                                         const TangoDecodeSequence* sequences, int32_t count, void* workspace,
                                         size_t workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif
#endif
