// What ONNX Runtime's operators lack, as its custom operators: sums and activations on the GPU (tango/activate.h). A
// session that registers the library (SessionOptions.register_custom_ops_library) finds them in the domain "tango":
//
//   Bias(x [..., C], bias [C]) -> y,   BiasGelu likewise,   SwiGLU(gate, up) -> y
//
// All tensors of one dtype, fp16 or fp32: two operators of one name, of which a session takes the one that fits. No
// arithmetic here.
#include <string>
#include <vector>

#include "onnxruntime_interface.h"
#include "tango/activate.h"

namespace {

#ifndef TANGO_ONNXRUNTIME_PROVIDER  // a test runs the operators on a CPU
#define TANGO_ONNXRUNTIME_PROVIDER "CUDAExecutionProvider"
#endif

constexpr uint32_t kVersion = 16;

using Enqueue = int (*)(int32_t dtype, const void* a, const void* b, int64_t rows, int64_t width, void* y, void* stream);

int swiglu(int32_t dtype, const void* gate, const void* up, int64_t rows, int64_t width, void* y, void* stream) {
    return tango_swiglu_enqueue(dtype, gate, up, rows * width, y, stream);
}

struct Operator : OrtCustomOp {
    const char* name;
    Enqueue enqueue;
    bool by_column;  // the second input is one row
    ONNXTensorElementDataType type;
};

struct Kernel {
    const Operator* op;
    const OrtApi* api;
};

struct Tensor {
    void* data = nullptr;
    std::vector<int64_t> shape;

    int64_t width() const { return shape.empty() ? 1 : shape.back(); }
    int64_t size() const {
        int64_t size = 1;
        for (int64_t length : shape) size *= length;
        return size;
    }
};

#define TANGO_TRY(call) \
    if (OrtStatus* status = (call)) return status

OrtStatus* read(const OrtApi* api, const OrtKernelContext* context, size_t index, Tensor& tensor) {
    const OrtValue* value = nullptr;
    TANGO_TRY(api->KernelContext_GetInput(context, index, &value));
    TANGO_TRY(api->GetTensorMutableData(const_cast<OrtValue*>(value), &tensor.data));
    OrtTensorTypeAndShapeInfo* info = nullptr;
    TANGO_TRY(api->GetTensorTypeAndShape(value, &info));
    size_t rank = 0;
    OrtStatus* failed = api->GetDimensionsCount(info, &rank);
    tensor.shape.resize(rank);
    if (failed == nullptr) failed = api->GetDimensions(info, tensor.shape.data(), rank);
    api->ReleaseTensorTypeAndShapeInfo(info);
    return failed;
}

OrtStatus* refuse(const Kernel& kernel, const std::string& why) {
    return kernel.api->CreateStatus(ORT_INVALID_ARGUMENT, (std::string("tango.") + kernel.op->name + ": " + why).c_str());
}

OrtStatus* compute(void* opaque, OrtKernelContext* context) {
    const Kernel& kernel = *static_cast<const Kernel*>(opaque);
    const OrtApi* api = kernel.api;
    Tensor a, b;
    TANGO_TRY(read(api, context, 0, a));
    TANGO_TRY(read(api, context, 1, b));
    if (kernel.op->by_column ? b.shape != std::vector<int64_t>{a.width()} : b.shape != a.shape)
        return refuse(kernel, "the shapes of the inputs do not fit");
    OrtValue* output = nullptr;
    void *y = nullptr, *stream = nullptr;
    TANGO_TRY(api->KernelContext_GetOutput(context, 0, a.shape.data(), a.shape.size(), &output));
    TANGO_TRY(api->GetTensorMutableData(output, &y));
    TANGO_TRY(api->KernelContext_GetGPUComputeStream(context, &stream));
    const int64_t rows = a.width() == 0 ? 0 : a.size() / a.width();
    if (rows == 0) return nullptr;
    const int dtype = kernel.op->type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? TANGO_FP16 : TANGO_FP32;
    if (kernel.op->enqueue(dtype, a.data, b.data, rows, a.width(), y, stream) != TANGO_OK)
        return refuse(kernel, tango_last_error());
    return nullptr;
}

OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo*, void** kernel) {
    *kernel = new Kernel{static_cast<const Operator*>(op), api};
    return nullptr;
}

Operator make(const char* name, Enqueue enqueue, bool by_column, ONNXTensorElementDataType type) {
    Operator op = {};
    op.version = kVersion;
    op.name = name, op.enqueue = enqueue, op.by_column = by_column, op.type = type;
    op.GetName = [](const OrtCustomOp* op) { return static_cast<const Operator*>(op)->name; };
    op.GetExecutionProviderType = [](const OrtCustomOp*) { return TANGO_ONNXRUNTIME_PROVIDER; };
    op.GetInputType = [](const OrtCustomOp* op, size_t) { return static_cast<const Operator*>(op)->type; };
    op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 2; };
    op.GetOutputType = op.GetInputType;
    op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
    op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    op.GetOutputCharacteristic = op.GetInputCharacteristic;
    op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    op.CreateKernelV2 = create;
    op.KernelComputeV2 = compute;
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
}

constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;

const Operator kOperators[] = {
    make("Bias", tango_bias_enqueue, true, kHalf),          make("Bias", tango_bias_enqueue, true, kFloat),
    make("BiasGelu", tango_bias_gelu_enqueue, true, kHalf), make("BiasGelu", tango_bias_gelu_enqueue, true, kFloat),
    make("SwiGLU", swiglu, false, kHalf),                   make("SwiGLU", swiglu, false, kFloat),
};

// One for the process, since sessions refer to it as long as they live.
OrtStatus* open_domain(const OrtApi* api, OrtCustomOpDomain** opened) {
    static OrtCustomOpDomain* domain = nullptr;
    if (domain == nullptr) {
        OrtCustomOpDomain* made = nullptr;
        TANGO_TRY(api->CreateCustomOpDomain("tango", &made));
        for (const Operator& op : kOperators) TANGO_TRY(api->CustomOpDomain_Add(made, &op));
        domain = made;
    }
    *opened = domain;
    return nullptr;
}

}  // namespace

extern "C" TANGO_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    const OrtApi* api = base->GetApi(kVersion);
    if (api == nullptr)
        return base->GetApi(1)->CreateStatus(ORT_FAIL, "tango's operators need ONNX Runtime 1.16 or later");
    OrtCustomOpDomain* domain = nullptr;
    TANGO_TRY(open_domain(api, &domain));
    return api->AddCustomOpDomain(options, domain);
}
