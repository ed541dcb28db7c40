/* Rows of a matrix in another order, on an NVIDIA GPU: what puts row ends between the tokens of a video. */
#ifndef TANGO_ROWS_H
#define TANGO_ROWS_H

#include "tango/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* gathered[i] = order[i] < 0 ? filler : rows[order[i]], for i < count.
 *
 * A row is `row_bytes` bytes, a multiple of 2: `rows` [.., row_bytes], `filler` [row_bytes], `gathered` [count,
 * row_bytes], `order` [count]. All are contiguous device memory; `gathered` overlaps none of the others, and every row
 * that `order` names exists. Enqueues one kernel on a stream (a cudaStream_t); a CUDA graph can capture it. Access is
 * in vectors of 16 bytes where pointers and rows are multiples of 16 bytes. Returns a TangoStatus. */
TANGO_API int tango_rows_gather_enqueue(const void* rows, const void* filler, const int32_t* order, int32_t count,
                                        int64_t row_bytes, void* gathered, void* stream);

#ifdef __cplusplus
}
#endif
#endif
