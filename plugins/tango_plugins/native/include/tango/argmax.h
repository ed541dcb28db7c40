/* Greedy sampling on an NVIDIA GPU: index and value of the largest logit, so that only 8 bytes go to the host. */
#ifndef TANGO_ARGMAX_H
#define TANGO_ARGMAX_H

#include "tango/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The lower index wins ties. NaN counts as larger than any number, so that the caller sees it. */
typedef struct TangoArgmax {
    int32_t index;
    float value;
} TangoArgmax;

/* Enqueues one kernel on a stream (a cudaStream_t); a CUDA graph can capture it. `values` [size] and `argmax` [1] are
 * device memory; size is at least 1. Returns a TangoStatus. */
TANGO_API int tango_argmax_enqueue(const float* values, int32_t size, TangoArgmax* argmax, void* stream);

/* Rows of one call, at most. */
#define TANGO_ARGMAX_ROWS 8

/* The same of several rows, with one kernel. `rows` [count] is host memory with the addresses of rows [size], `argmax`
 * [count] device memory; count is from 1 to TANGO_ARGMAX_ROWS. */
TANGO_API int tango_argmax_rows_enqueue(const float* const* rows, int32_t count, int32_t size, TangoArgmax* argmax,
                                        void* stream);

#ifdef __cplusplus
}
#endif
#endif
