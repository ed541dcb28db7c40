/* Matrices whose weights are fp16, FP8, or integers with scales, and the product of many rows with one on an NVIDIA
 * GPU. */
#ifndef TANGO_LINEAR_H
#define TANGO_LINEAR_H

#include "tango/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How a matrix [inputs, outputs] is stored. Blocks lie along the inputs of one output; what fills up an output's last
 * block does not count. */
typedef enum TangoWeights {
    TANGO_WEIGHTS_FP16 = 0,     /* fp16 [inputs, outputs] */
    TANGO_WEIGHTS_INT8 = 1,     /* int8 [inputs, outputs]: times scales, fp32 [outputs] */
    TANGO_WEIGHTS_BLOCKS_4 = 2, /* 4 bits [outputs, blocks, group], two in a byte, the first in the low half */
    TANGO_WEIGHTS_BLOCKS_8 = 3, /* 8 bits [outputs, blocks, group] */
    TANGO_WEIGHTS_FP8 = 4       /* FP8 [outputs, inputs]: times a scale, fp16 [1] */
} TangoWeights;

/* A matrix in device memory, aligned to 16 bytes. Elements of blocks are unsigned; an element q is (q - zero) scale,
 * with fp16 scales [outputs, blocks]. Zeros are [outputs, blocks], packed as the elements are, each output's in bytes
 * of its own; null stands for the middle of the range, 8 or 128. */
typedef struct TangoMatrix {
    const void* values;
    const void* scales; /* null for fp16 */
    const void* zeros;
    int32_t weights;     /* a TangoWeights */
    int16_t group;       /* elements of a block: 32, 64 or 128; else 0 */
    int16_t interleaved; /* 1: blocks are as tango_interleave_enqueue leaves them; else 0 */
} TangoMatrix;

typedef struct TangoLinearShape {
    int32_t rows;
    int32_t inputs;
    int32_t outputs;
} TangoLinearShape;

/* Enqueues on a stream (a cudaStream_t) what makes decode steps faster: of every 16 outputs of a matrix of blocks,
 * pieces of 64 bytes of the values change, in place, from the order [output, piece] to [piece, output], and the scales
 * from [output, block] to [block, output]; zeros stay. Returns a TangoStatus.
 *
 * For all that reads the matrix from then on, `interleaved` is 1; given here, it is 0. A matrix whose outputs are no
 * multiple of 16 or have no multiple of 64 bytes stays as it is, and its readers know it by its shape. The workspace is
 * device memory aligned to 16 bytes that is free again after the call's work; it has 16 outputs or more. */
TANGO_API int tango_interleave_enqueue(const TangoMatrix* matrix, int32_t inputs, int32_t outputs, void* workspace,
                                       size_t workspace_bytes, void* stream);

/* Bytes of a workspace with which the product of integers is fastest on the current GPU, room for one slab; 0 where it
 * is fastest without one: on any GPU but Hopper, and where cuBLASLt cannot be loaded. More rows never need more.
 * Returns a TangoStatus. */
TANGO_API int tango_linear_workspace(const TangoLinearShape* shape, size_t* bytes);

/* Enqueues y = x matrix on a stream (a cudaStream_t), for integers; returns a TangoStatus.
 *
 * x is fp16 [rows, inputs], y fp16 [rows, outputs]. Accumulators are fp32, and y is rounded once. Rows of a multiple of
 * 16 bytes are read fastest.
 *
 * Without a workspace (null) weights become fp16 in registers: those of blocks are multiplied by their scale and
 * rounded; other integers are exact, and the sum is scaled. With one, which is device memory aligned to 16 bytes with
 * any contents, they become fp16 there, in slabs of as many outputs as it has room for: all of them or, at the least,
 * 128. cuBLASLt multiplies each slab, as in tango_fp16_linear_enqueue. Those of blocks become the same numbers; other
 * integers are multiplied by their scale and rounded.
 */
TANGO_API int tango_linear_enqueue(const TangoLinearShape* shape, const TangoMatrix* matrix, const void* x, void* y,
                                   void* workspace, size_t workspace_bytes, void* stream);

/* Contiguous device memory in fp16, aligned to 2 bytes; of 16, and with widths that are multiples of 8, cuBLASLt has
 * faster algorithms. */
typedef struct TangoFp16LinearTensors {
    const void* x;      /* [rows, inputs] */
    const void* weight; /* [inputs, outputs] */
    const void* bias;   /* [outputs]; any without GELU */
    void* y;            /* [rows, outputs], written */
} TangoFp16LinearTensors;

/* Enqueues y = x weight on a stream (a cudaStream_t); returns a TangoStatus. Sums are fp32, and y is rounded once.
 *
 * cuBLASLt multiplies: libcublasLt.so.13, .12 or .11, which is loaded at the first call and comes with CUDA. It chooses
 * an algorithm without a workspace at the first call with a shape. The same arguments give the same bits on the same
 * GPU.
 */
TANGO_API int tango_fp16_linear_enqueue(const TangoLinearShape* shape, const TangoFp16LinearTensors* tensors,
                                        void* stream);

/* The same in one kernel with what follows in an MLP: y = GELU(x weight + bias), with GELU's tanh form (TANGO_GELU_TANH
 * of tango/activation.h). Widths must be multiples of 8, and tensors aligned to 16 bytes: for others, cuBLASLt has
 * kernels that round the sum to fp16 before its GELU.
 */
TANGO_API int tango_fp16_linear_gelu_enqueue(const TangoLinearShape* shape, const TangoFp16LinearTensors* tensors,
                                             void* stream);

/* Loads cuBLASLt, as the first product of fp16 or FP8 would, and writes its major version; returns a TangoStatus. */
TANGO_API int tango_cublaslt_version(int32_t* version);

#define TANGO_MAX_INT8_INPUTS 131071

/* Enqueues y = (x matrix) x_scale on a stream (a cudaStream_t), for INT8 activations and TANGO_WEIGHTS_INT8; returns a
 * TangoStatus.
 *
 * x is INT8 [rows, inputs], y fp16 [rows, outputs]. Sums are exact: up to TANGO_MAX_INT8_INPUTS products of any two
 * such numbers fit into their 32 bits. A sum is rounded to fp32, multiplied by the fp32 product of x_scale and the
 * output's scale, and rounded to fp16. Rows of a multiple of 16 bytes are read fastest.
 */
TANGO_API int tango_int8_linear_enqueue(const TangoLinearShape* shape, const TangoMatrix* matrix, const void* x,
                                        float x_scale, void* y, void* stream);

#ifdef __cplusplus
}
#endif
#endif
