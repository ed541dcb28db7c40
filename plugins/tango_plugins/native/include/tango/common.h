/* What all headers of this library share: results, element types and versions. */
#ifndef TANGO_COMMON_H
#define TANGO_COMMON_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define TANGO_API __attribute__((visibility("default")))
#else
#define TANGO_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Increases whenever a struct or a function of any of these headers changes. A caller compares it with
 * tango_abi_version() of the library that it has loaded. */
#define TANGO_ABI_VERSION 12

/* What every function that can fail returns. */
typedef enum TangoStatus {
    TANGO_OK = 0,
    TANGO_BAD_ARGUMENT = 1, /* a shape, parameter or pointer is invalid */
    TANGO_SMALL_WORKSPACE = 2,
    TANGO_CUDA_ERROR = 3
} TangoStatus;

/* The last two are for quantized results. A function that writes them takes a scale: an element times the scale is the
 * result, rounded to nearest (even) and saturated. FP8 is E4M3, up to 448; NaN stays NaN. INT8 is from -128 to 127, as
 * by ONNX's QuantizeLinear without a zero point; NaN becomes 0. */
typedef enum TangoDtype { TANGO_FP16 = 0, TANGO_FP32 = 1, TANGO_FP8 = 2, TANGO_INT8 = 3 } TangoDtype;

/* The error of this thread's last call that did not return TANGO_OK. It names the argument. */
TANGO_API const char* tango_last_error(void);

TANGO_API int tango_abi_version(void);

/* Version of the library, the CUDA it was built with, and the GPU architectures that it was built for: sm_… for machine
 * code, compute_… for PTX. Such as "0.1.0 CUDA 13.0 sm_87 sm_90a compute_87". */
TANGO_API const char* tango_version(void);

/* Bytes of a struct by its name, such as "TangoPruneParams"; 0 if there is no such struct. Bindings compare it with
 * their own declaration. */
TANGO_API size_t tango_sizeof(const char* name);

#ifdef __cplusplus
}
#endif
#endif
