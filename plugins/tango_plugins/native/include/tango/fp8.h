/* The product of FP8 (E4M3) activations with an FP8 matrix on an NVIDIA GPU. */
#ifndef TANGO_FP8_H
#define TANGO_FP8_H

#include "tango/common.h"
#include "tango/linear.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Contiguous device memory, aligned to 16 bytes; of 256, cuBLASLt may choose a faster algorithm. */
typedef struct TangoFp8LinearTensors {
    const void* x;             /* FP8 [rows, inputs] */
    const void* weight;        /* FP8 [outputs, inputs] */
    const float* weight_scale; /* [1] */
    const void* bias;          /* fp16 [outputs]; any without GELU */
    const float* y_factor;     /* [1], the inverse of y's scale; any without GELU */
    void* y;                   /* [rows, outputs], written: fp16, with GELU FP8 */
} TangoFp8LinearTensors;

/* Enqueues y = (x weight^T) x_scale weight_scale on a stream (a cudaStream_t); returns a TangoStatus. Inputs and
 * outputs are multiples of 16, and the GPU has compute capability 8.9 or later.
 *
 * cuBLASLt multiplies: libcublasLt.so.13 or .12, which is loaded at the first call and comes with CUDA. It chooses an
 * algorithm without a workspace at the first call with a shape. Its fast accumulation is on: a tensor core keeps a sum
 * to some 14 bits while it adds to it. For random numbers the error of y is 0.06 % of its norm with 1152 inputs and
 * 0.34 % with 18,944; that of rounding x and the weights to FP8 is 3.7 %.
 */
TANGO_API int tango_fp8_linear_enqueue(const TangoLinearShape* shape, const TangoFp8LinearTensors* tensors,
                                       float x_scale, void* stream);

/* The same in one kernel with what follows in an MLP: y = GELU((x weight^T) x_scale weight_scale + bias) y_factor in
 * FP8, with GELU's tanh form (TANGO_GELU_TANH of tango/activation.h).
 */
TANGO_API int tango_fp8_linear_gelu_enqueue(const TangoLinearShape* shape, const TangoFp8LinearTensors* tensors,
                                            float x_scale, void* stream);

#ifdef __cplusplus
}
#endif
#endif
