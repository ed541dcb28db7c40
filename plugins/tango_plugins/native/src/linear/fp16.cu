// The product of fp16 matrices (tango/linear.h): what is checked before cuBLASLt multiplies.
#include "common/check.h"
#include "linear/product.h"

using namespace tango;

namespace {

int check_tensors(const TangoFp16LinearTensors& tensors, bool has_bias) {
    constexpr size_t kHalf = 2;  // its bytes
    if (int status = check_pointer("x", tensors.x, kHalf)) return status;
    if (int status = check_pointer("weight", tensors.weight, kHalf)) return status;
    if (int status = check_pointer("y", tensors.y, kHalf)) return status;
    return has_bias ? check_pointer("bias", tensors.bias, kHalf) : TANGO_OK;
}

}  // namespace

int tango_fp16_linear_enqueue(const TangoLinearShape* shape, const TangoFp16LinearTensors* tensors, int32_t epilogue,
                              void* workspace, size_t workspace_bytes, void* stream) {
    constexpr int kWidest = 1 << 20;
    if (int status = check_pointer("shape", shape, 1)) return status;
    if (int status = check_ranges({{"rows", shape->rows, 0, 1 << 24},
                                   {"inputs", shape->inputs, 1, kWidest},
                                   {"outputs", shape->outputs, 1, kWidest},
                                   {"epilogue", epilogue, TANGO_EPILOGUE_NONE, TANGO_EPILOGUE_BIAS_GELU}}))
        return status;
    if (int status = check_pointer("tensors", tensors, 1)) return status;
    if (shape->rows == 0) return TANGO_OK;
    const bool has_bias = epilogue != TANGO_EPILOGUE_NONE;
    if (int status = check_tensors(*tensors, has_bias)) return status;
    if (workspace_bytes != 0)
        if (int status = check_pointer("workspace", workspace, 256)) return status;
    Product product = {"linear", *shape,    static_cast<TangoEpilogue>(epilogue), tensors->x, tensors->weight,
                       nullptr,  tensors->y};
    if (has_bias) product.bias = tensors->bias;
    product.workspace = workspace, product.workspace_bytes = workspace_bytes;
    return multiply(product, static_cast<cudaStream_t>(stream));
}

int tango_cublaslt_version(int32_t* version) {
    if (int status = check_pointer("version", version, alignof(int32_t))) return status;
    return load_cublaslt("version", *version);
}
