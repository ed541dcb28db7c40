/* Frames of a video on an NVIDIA GPU → input of a vision graph: color conversion, rotation and resize to uint8 RGB.
 *
 * The result equals that of the same steps on a CPU, bit for bit: for NV12 FFmpeg's conversion of yuv420p to rgb24 on
 * x86, without interpolation of chroma, then Pillow's bicubic resize, whose filter widens with the reduction. P010 is
 * converted in the same way, where FFmpeg keeps eight of the ten bits. */
#ifndef TANGO_FRAMES_H
#define TANGO_FRAMES_H

#include "tango/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum TangoPixelFormat {
    TANGO_RGB24 = 0, /* uint8 [rows, columns, 3] */
    TANGO_NV12 = 1,  /* luma uint8 [rows, columns], chroma uint8 [ceil(rows / 2), ceil(columns / 2), 2] */
    TANGO_P010 = 2   /* the same in little-endian 16 bits, of which the upper 10 count */
} TangoPixelFormat;

typedef struct TangoResizeShape {
    int32_t frames;        /* from 0 to 65536 */
    int32_t format;        /* TangoPixelFormat */
    int32_t rows, columns; /* of a source frame as it is stored, from 1 to 65536 pixels */
    int32_t pitch;         /* bytes from a row to the next, of luma and chroma alike */
    int32_t frame_rows;    /* rows of `pitch` bytes from a frame to the next; any number for a single frame */
    int32_t matrix;        /* color matrix of NV12 and P010: MatrixCoefficients of ITU-T H.273, 1, 4, 5, 6, 7 or 9;
                              2 (unspecified) is taken as 5 */
    int32_t full_range;    /* 1: luma is from 0 to 255, as in JPEG; 0: from 16 to 235 */
    /* How the frame is shown: rows and columns are exchanged, then their order is reversed. 0 or 1 each. */
    int32_t transpose, flip_rows, flip_columns;
    int32_t out_rows, out_columns; /* from 1 to 65536 */
    int32_t columns_first; /* 1: columns are resized before rows; values are rounded in between. Pillow before 13 begins
                              with the rows; from 13 on with the columns if the height, as shown, shrinks by more
                              pixels than twice what the width does (a negative number where it grows). */
} TangoResizeShape;

typedef struct TangoResizeTensors {
    const void* image;  /* RGB or luma of the first frame; P010 aligned to 2 bytes */
    const void* chroma; /* of the first frame; null for RGB */
    void* resized;      /* uint8 RGB [frames, out_rows, out_columns, 3], written */
} TangoResizeTensors;

/* Bytes of device memory that `tango_resize_enqueue` needs. Returns a TangoStatus. */
TANGO_API int tango_resize_workspace(const TangoResizeShape* shape, size_t* bytes);

/* Enqueues three kernels on a stream (a cudaStream_t); a CUDA graph can capture them. Returns a TangoStatus.
 * `workspace` is aligned to 256 bytes; nothing in it lasts. */
TANGO_API int tango_resize_enqueue(const TangoResizeShape* shape, const TangoResizeTensors* tensors, void* workspace,
                                   size_t workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif
#endif
