/* Greedy sampling on an NVIDIA GPU: the greatest of a row of logits, so that eight bytes cross to the host and not all
 * of them.
 */
#ifndef TANGO_ARGMAX_H
#define TANGO_ARGMAX_H

#include <stdint.h>

#include "tango/prune.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Among equal values the lower index wins; NaN counts as greater than any number, so that it is not overlooked. */
typedef struct TangoGreatest {
    int32_t index;
    float value;
} TangoGreatest;

/* Enqueues the search on a stream (a cudaStream_t): one kernel, which a CUDA graph can capture. `values` [size] and
 * `greatest` [1] are device memory, size at least 1. Returns a cudaError_t, 0 where all is well. */
TANGO_API int tango_argmax_enqueue(const float* values, int32_t size, TangoGreatest* greatest, void* stream);

#ifdef __cplusplus
}
#endif
#endif
