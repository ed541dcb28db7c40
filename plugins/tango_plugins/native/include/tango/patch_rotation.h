/* The rotary embedding of a vision tower's queries and keys on an NVIDIA GPU, with their bias, in front of its
 * attention (tango/vision_attention.h), which takes the result without one. In small windows that rotates by itself.
 * One kernel, one pass over memory.
 */
#ifndef TANGO_PATCH_ROTATION_H
#define TANGO_PATCH_ROTATION_H

#include "tango/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct TangoPatchRotationShape {
    int32_t frames;   /* F */
    int32_t tokens;   /* patches of a frame, T */
    int32_t heads;    /* H */
    int32_t head_dim; /* d: a multiple of 16 */
    int32_t dtype;    /* of query and key: TANGO_FP16 or TANGO_FP32 */
} TangoPatchRotationShape;

/* Contiguous device memory aligned to 16 bytes. The rotary embedding pairs dimensions i and d / 2 + i of a head; cosine
 * and sine of a pair's angle are at [patch of the frame, i]. */
typedef struct TangoPatchRotationTensors {
    const void* qkv;      /* fp16 [F, T, 3 H d]: query, key and value of each patch, without bias; no value is read */
    const void* bias;     /* fp16 [3 H d], added to them */
    const float* cosines; /* [T, d / 2] */
    const float* sines;   /* as cosines */
    void* query;          /* [F, T, H d], written */
    void* key;            /* as query */
} TangoPatchRotationTensors;

/* Enqueues it on a stream (a cudaStream_t), which a CUDA graph can capture, and returns a TangoStatus. Arithmetic is
 * fp32. */
TANGO_API int tango_patch_rotation_enqueue(const TangoPatchRotationShape* shape,
                                           const TangoPatchRotationTensors* tensors, void* stream);

#ifdef __cplusplus
}
#endif
#endif
