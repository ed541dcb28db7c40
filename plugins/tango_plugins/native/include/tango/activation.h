/* Bias, activation and quantization between the matrix products of an MLP, each in one pass over memory. Arithmetic is
 * fp32 for either element type.
 */
#ifndef TANGO_ACTIVATION_H
#define TANGO_ACTIVATION_H

#include "tango/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Each function enqueues one kernel on a stream (a cudaStream_t); a CUDA graph can capture it. It returns a
 * TangoStatus. Tensors are contiguous device memory of one TangoDtype, fp16 or fp32, but `y` may also be FP8 or INT8,
 * with `y_scale`, which is any for another. `y` may be the first input if it has its type. Access is in vectors of 16
 * bytes where pointers and rows are multiples of 16 bytes, else by element. */

/* y = x + bias, with x and y [rows, width] and bias [width]. */
TANGO_API int tango_bias_enqueue(int32_t dtype, const void* x, const void* bias, int64_t rows, int64_t width, void* y,
                                 void* stream);

typedef enum TangoGelu {
    TANGO_GELU_ERF = 0, /* exact: 0.5 u (1 + erf(u / sqrt(2))) */
    TANGO_GELU_TANH = 1 /* approximated: 0.5 u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) */
} TangoGelu;

/* y = GELU(x + bias), of the form that `gelu` (a TangoGelu) names; `bias` may be null. */
TANGO_API int tango_bias_gelu_enqueue(int32_t dtype, int32_t gelu, const void* x, const void* bias, int64_t rows,
                                      int64_t width, int32_t y_dtype, float y_scale, void* y, void* stream);

/* y = SiLU(gate) up = gate / (1 + exp(-gate)) up, all [size]. */
TANGO_API int tango_swiglu_enqueue(int32_t dtype, const void* gate, const void* up, int64_t size, int32_t y_dtype,
                                   float y_scale, void* y, void* stream);

/* y = SiLU(gate + gate_bias) (up + up_bias) scale, with gate, up and y [rows, width] and the biases [width]. */
TANGO_API int tango_bias_swiglu_enqueue(int32_t dtype, const void* gate, const void* gate_bias, const void* up,
                                        const void* up_bias, int64_t rows, int64_t width, float scale, int32_t y_dtype,
                                        float y_scale, void* y, void* stream);

/* y = x / y_scale in FP8 or INT8, both [size]. */
TANGO_API int tango_quantize_enqueue(int32_t dtype, const void* x, int64_t size, int32_t y_dtype, float y_scale,
                                     void* y, void* stream);

#ifdef __cplusplus
}
#endif
#endif
