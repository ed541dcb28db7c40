// The product of fp16 matrices (tango/linear.h): what is checked before cuBLASLt multiplies.
#include "common/check.h"
#include "linear/product.h"

using namespace tango;

namespace {

int check_tensors(const TangoFp16LinearTensors& tensors, size_t alignment) {
    if (int status = check_pointer("x", tensors.x, alignment)) return status;
    if (int status = check_pointer("weight", tensors.weight, alignment)) return status;
    return check_pointer("y", tensors.y, alignment);
}

// With a GELU, cuBLASLt's kernels for other rows than these round the sum to fp16 first.
int check_gelu(const TangoLinearShape& shape, const TangoFp16LinearTensors& tensors, size_t alignment) {
    const int multiple = alignment / sizeof(uint16_t);
    if (int status = check_multiple("inputs", shape.inputs, multiple)) return status;
    if (int status = check_multiple("outputs", shape.outputs, multiple)) return status;
    return check_pointer("bias", tensors.bias, alignment);
}

int enqueue(const TangoLinearShape* shape, const TangoFp16LinearTensors* tensors, bool has_gelu, void* stream) {
    constexpr int kWidest = 1 << 20;
    const size_t alignment = has_gelu ? 16 : sizeof(uint16_t);
    if (int status = check_pointer("shape", shape, 1)) return status;
    if (int status = check_ranges({{"rows", shape->rows, 0, 1 << 24},
                                   {"inputs", shape->inputs, 1, kWidest},
                                   {"outputs", shape->outputs, 1, kWidest}}))
        return status;
    if (int status = check_pointer("tensors", tensors, 1)) return status;
    if (shape->rows == 0) return TANGO_OK;
    if (int status = check_tensors(*tensors, alignment)) return status;
    if (has_gelu)
        if (int status = check_gelu(*shape, *tensors, alignment)) return status;
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
