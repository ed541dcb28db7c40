// The product of FP8 matrices (tango/fp8.h): what is checked before cuBLASLt multiplies.
#include <cmath>

#include "common/check.h"
#include "common/device.h"
#include "linear/product.h"
#include "tango/fp8.h"

using namespace tango;

namespace {

int check_width(const char* name, int width) {
    constexpr int kMultiple = 16;  // of cuBLASLt's kernels for FP8: rows of both matrices are multiples of 16 bytes
    if (int status = check_ranges({{name, width, kMultiple, 1 << 20}})) return status;
    return check_multiple(name, width, kMultiple);
}

int check_tensors(const TangoFp8LinearTensors& tensors, bool has_gelu) {
    const struct {
        const char* name;
        const void* pointer;
        size_t alignment;
    } all[] = {{"x", tensors.x, 16},
               {"weight", tensors.weight, 16},
               {"weight_scale", tensors.weight_scale, sizeof(float)},
               {"y", tensors.y, 16}};
    for (const auto& tensor : all)
        if (int status = check_pointer(tensor.name, tensor.pointer, tensor.alignment)) return status;
    if (!has_gelu) return TANGO_OK;
    if (int status = check_pointer("bias", tensors.bias, 16)) return status;
    return check_pointer("y_factor", tensors.y_factor, sizeof(float));
}

int check_gpu() {
    DeviceProperties gpu;
    if (int status = cuda_status(query_device(gpu), "fp8 linear")) return status;
    if (10 * gpu.major + gpu.minor >= 89) return TANGO_OK;
    return fail(TANGO_CUDA_ERROR,
                "fp8 linear: this GPU has compute capability %d.%d, and FP8 needs 8.9 or later; use INT8 or fp16",
                gpu.major, gpu.minor);
}

int enqueue(const TangoLinearShape* shape, const TangoFp8LinearTensors* tensors, float x_scale, bool has_gelu,
            void* stream) {
    if (int status = check_pointer("shape", shape, 1)) return status;
    if (int status = check_ranges({{"rows", shape->rows, 0, 1 << 24}})) return status;
    if (int status = check_width("inputs", shape->inputs)) return status;
    if (int status = check_width("outputs", shape->outputs)) return status;
    if (int status = check_pointer("tensors", tensors, 1)) return status;
    if (int status = check_scale("x_scale", TANGO_FP8, x_scale)) return status;
    if (shape->rows == 0) return TANGO_OK;
    if (int status = check_tensors(*tensors, has_gelu)) return status;
    if (int status = check_gpu()) return status;
    Product product = {"fp8 linear", *shape, tensors->x, tensors->weight, tensors->y};
    product.factor = x_scale;
    product.is_fp8 = product.by_outputs = true;
    product.weight_scale = tensors->weight_scale;
    if (has_gelu) product.bias = tensors->bias, product.y_factor = tensors->y_factor;
    return multiply(product, static_cast<cudaStream_t>(stream));
}

}  // namespace

int tango_fp8_linear_enqueue(const TangoLinearShape* shape, const TangoFp8LinearTensors* tensors, float x_scale,
                             void* stream) {
    return enqueue(shape, tensors, x_scale, false, stream);
}

int tango_fp8_linear_gelu_enqueue(const TangoLinearShape* shape, const TangoFp8LinearTensors* tensors, float x_scale,
                                  void* stream) {
    return enqueue(shape, tensors, x_scale, true, stream);
}
