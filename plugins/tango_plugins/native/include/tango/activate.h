/* What an MLP does between its products, in one pass over memory each: a sum and an activation, in fp32 whatever the
 * tensors are. An engine whose own operators take more passes, or slower ones, calls these.
 */
#ifndef TANGO_ACTIVATE_H
#define TANGO_ACTIVATE_H

#include <stdint.h>

#include "tango/prune.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Each enqueues one kernel on a stream (a cudaStream_t), which a CUDA graph can capture. Tensors are device memory,
 * contiguous, of one TangoDtype; `y` may be the first of them. Tensors at multiples of 16 bytes, and rows of as many,
 * are read and written in such pieces, others an element at a time. */

/* y = x + bias, x and y [rows, width], bias [width]. */
TANGO_API int tango_bias_enqueue(int32_t dtype, const void* x, const void* bias, int64_t rows, int64_t width, void* y,
                                 void* stream);

/* y = GELU(x + bias) by the approximation with tanh, 0.5 u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))). */
TANGO_API int tango_bias_gelu_enqueue(int32_t dtype, const void* x, const void* bias, int64_t rows, int64_t width,
                                      void* y, void* stream);

/* y = SiLU(gate) up = gate / (1 + exp(-gate)) up, all [size]. */
TANGO_API int tango_swiglu_enqueue(int32_t dtype, const void* gate, const void* up, int64_t size, void* y,
                                   void* stream);

#ifdef __cplusplus
}
#endif
#endif
