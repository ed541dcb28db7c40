// The product of fp16 matrices (tango/linear.h): what is checked before cuBLASLt multiplies.
#include "common/check.h"
#include "linear/product.h"

using namespace tango;

namespace {

int check_tensors(const TangoFp16LinearTensors& tensors, bool has_gelu) {
    constexpr size_t kHalf = 2;  // its bytes
    if (int status = check_pointer("x", tensors.x, kHalf)) return status;
    if (int status = check_pointer("weight", tensors.weight, kHalf)) return status;
    if (int status = check_pointer("y", tensors.y, kHalf)) return status;
    return has_gelu ? check_pointer("bias", tensors.bias, kHalf) : TANGO_OK;
}

int enqueue(const TangoLinearShape* shape, const TangoFp16LinearTensors* tensors, bool has_gelu, void* stream) {
    constexpr int kWidest = 1 << 20;
    if (int status = check_pointer("shape", shape, 1)) return status;
    if (int status = check_ranges({{"rows", shape->rows, 0, 1 << 24},
                                   {"inputs", shape->inputs, 1, kWidest},
                                   {"outputs", shape->outputs, 1, kWidest}}))
        return status;
    if (int status = check_pointer("tensors", tensors, 1)) return status;
    if (shape->rows == 0) return TANGO_OK;
    if (int status = check_tensors(*tensors, has_gelu)) return status;
    Product product = {"linear", *shape, tensors->x, tensors->weight, tensors->y};
    if (has_gelu) product.bias = tensors->bias;
    return multiply(product, static_cast<cudaStream_t>(stream));
}

}  // namespace

int tango_fp16_linear_enqueue(const TangoLinearShape* shape, const TangoFp16LinearTensors* tensors, void* stream) {
    return enqueue(shape, tensors, false, stream);
}

int tango_fp16_linear_gelu_enqueue(const TangoLinearShape* shape, const TangoFp16LinearTensors* tensors, void* stream) {
    return enqueue(shape, tensors, true, stream);
}

int tango_cublaslt_version(int32_t* version) {
    if (int status = check_pointer("version", version, alignof(int32_t))) return status;
    return load_cublaslt("version", *version);
}
