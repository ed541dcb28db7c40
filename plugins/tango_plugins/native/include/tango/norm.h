/* LayerNorm and RMSNorm of rows on an NVIDIA GPU, after the residual addition that comes before them in a transformer.
 * One kernel, one pass over memory.
 */
#ifndef TANGO_NORM_H
#define TANGO_NORM_H

#include "tango/common.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TANGO_MAX_NORM_WIDTH 8192

/* Element types are TangoDtype, in any combination; only y may be FP8 or INT8. */
typedef struct TangoNormShape {
    int32_t rows;         /* may be 0 */
    int32_t width;        /* of a row, from 1 to TANGO_MAX_NORM_WIDTH */
    int32_t stream_dtype; /* of the residual stream: residual and sum */
    int32_t branch_dtype; /* of branch; any if it is null */
    int32_t bias_dtype;   /* of bias; any if it is null */
    int32_t y_dtype;
    float epsilon;      /* added to the variance, or to the mean square */
    float branch_scale; /* branch is multiplied by it; any if branch is null */
    float y_scale;      /* of an FP8 or INT8 y; any for another */
} TangoNormShape;

/* Contiguous device memory. Access is in vectors where `width` is a multiple of 8 and all pointers are aligned to 16
 * bytes, else by element. `sum` may be `residual`, and `y` may be `residual` or `branch` if it has its type. */
typedef struct TangoNormTensors {
    const void* residual; /* [rows, width] */
    const void* branch;   /* [rows, width], times branch_scale added to residual; may be null */
    const void* bias;     /* [width], added to both; may be null, and must be if branch is */
    const float* weight;  /* [width] */
    const float* beta;    /* [width], or null: added to the normed values */
    void* sum;            /* [rows, width], written: residual + (branch branch_scale + bias); may be null */
    void* y;              /* [rows, width], written */
} TangoNormTensors;

/* Both enqueue one kernel on a stream (a cudaStream_t), which a CUDA graph can capture, and return a TangoStatus.
 * Arithmetic is fp32. What is normed is the sum as rounded to the type of the stream, also where it is not written: the
 * result is that of an addition and a norm one after the other. */

/* y = (sum - mean) / sqrt(variance + epsilon) weight + beta. */
TANGO_API int tango_layer_norm_enqueue(const TangoNormShape* shape, const TangoNormTensors* tensors, void* stream);

/* y = sum / sqrt(mean of sum^2 + epsilon) weight + beta. */
TANGO_API int tango_rms_norm_enqueue(const TangoNormShape* shape, const TangoNormTensors* tensors, void* stream);

#ifdef __cplusplus
}
#endif
#endif
