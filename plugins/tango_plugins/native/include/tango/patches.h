/* Frames of a video on an NVIDIA GPU → input of a tower's patch embedding: normalized, and patch by patch. One kernel,
 * one pass over memory.
 */
#ifndef TANGO_PATCHES_H
#define TANGO_PATCHES_H

#include "tango/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A patch is a square of pixels in each of several frames, its steps. */
typedef struct TangoPatchesShape {
    int32_t frames;  /* F: groups of frames that follow one another */
    int32_t steps;   /* S: frames of a group */
    int32_t rows;    /* of a frame, in pixels: a multiple of size */
    int32_t columns; /* as rows */
    int32_t size;    /* p: edge of a patch, in pixels */
} TangoPatchesShape;

/* Contiguous device memory. R = rows / p and C = columns / p are the grid of patches. */
typedef struct TangoPatchesTensors {
    const void* pixels;     /* uint8 RGB [F, S, rows, columns, 3] */
    const float* mean;      /* [3] of the channels, of pixels from 0 to 1 */
    const float* deviation; /* as mean */
    void* patches;          /* fp16 [F, R, C, S, p, 3 p], written: (pixel / 255 - mean) / deviation */
} TangoPatchesTensors;

/* Enqueues it on a stream (a cudaStream_t), which a CUDA graph can capture, and returns a TangoStatus. Arithmetic is
 * fp32, each operation rounded by IEEE 754, and the result is rounded once to fp16. */
TANGO_API int tango_patches_enqueue(const TangoPatchesShape* shape, const TangoPatchesTensors* tensors, void* stream);

#ifdef __cplusplus
}
#endif
#endif
