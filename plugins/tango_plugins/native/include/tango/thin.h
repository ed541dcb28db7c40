/* Inner pruning on an NVIDIA GPU: a decoder drops some of the video's rows between two of its layers.
 * tango_plugins/thinning.py is the reference. */
#ifndef TANGO_THIN_H
#define TANGO_THIN_H

#include "tango/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A prompt of `rows` rows, of which `video_rows` from row `begin` on are the video's, and `kept` of these stay. Rows
 * are `width` elements of a TangoDtype. */
typedef struct TangoThinShape {
    int32_t rows;
    int32_t begin;
    int32_t video_rows;
    int32_t kept;
    int32_t width;
    int32_t dtype;
} TangoThinShape;

/* Contiguous device memory. With M = rows - video_rows + kept: `prompt` [rows, width], `share` [rows] (the
 * attention of the prompt's last row to each row; only the video's are read), `thinned` [M, width], `stay` [M] (where
 * each of these rows was, ascending). `thinned` does not overlap `prompt`. */
typedef struct TangoThinTensors {
    const void* prompt;
    const float* share;
    void* thinned;
    int32_t* stay;
} TangoThinTensors;

/* Bytes of scratch memory that an enqueue with this shape needs. Returns a TangoStatus. */
TANGO_API int tango_thin_workspace(const TangoThinShape* shape, size_t* bytes);

/* The video's rows with the largest shares stay; of equal ones the first. Each other row of the video joins the staying
 * row with the largest cosine; of equal ones the one with the larger share. A row x that m rows join becomes
 * 0.6 x + 0.4 (x + their sum) / (1 + m). All other rows are copied.
 *
 * Enqueues kernels on a stream (a cudaStream_t); a CUDA graph can capture them. The same input gives the same bits.
 * `workspace` is device memory, aligned to 256 bytes, with any contents. Accumulators are fp32. Returns a
 * TangoStatus. */
TANGO_API int tango_thin_enqueue(const TangoThinShape* shape, const TangoThinTensors* tensors, void* workspace,
                                 size_t workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif
#endif
