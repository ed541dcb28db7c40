// The operators as ONNX Runtime's custom operators on the GPU. A session that registers the library finds them in the
// domain "tango" (SessionOptions.register_custom_ops_library). An operator with several signatures becomes as many
// custom operators of one name, and a session takes the one that fits. All weights in blocks of a session whose options
// have the entry kInterleaved are interleaved (tango/linear.h).
#include <mutex>
#include <new>
#include <string>

#include "adapters/operators.h"
#include "interface.h"
#include "tango/common.h"

namespace {

using tango::Lengths;
using tango::Tensor;
using tango::Type;

#ifndef TANGO_ONNXRUNTIME_PROVIDER  // tests run the operators on a CPU
#define TANGO_ONNXRUNTIME_PROVIDER "CUDAExecutionProvider"
#endif

#define TANGO_TRY(call) \
    if (OrtStatus* status = (call)) return status

constexpr uint32_t kVersion = 16;
constexpr char kInterleaved[] = "tango.interleaved";

// An operator with one of its signatures.
struct CustomOp : OrtCustomOp {
    const tango::Operator* op;
    const tango::Signature* signature;
    bool interleaved;
};

const CustomOp& cast(const OrtCustomOp* op) { return *static_cast<const CustomOp*>(op); }

// An operator as a node of a graph.
struct Kernel {
    const CustomOp* custom;
    const OrtApi* api;
    std::vector<tango::Value> attributes = {};

    // Converts a TangoStatus.
    OrtStatus* convert(int status) const {
        if (status == TANGO_OK) return nullptr;
        const std::string message = std::string("tango.") + custom->op->name + ": " + tango_last_error();
        return api->CreateStatus(status == TANGO_BAD_ARGUMENT ? ORT_INVALID_ARGUMENT : ORT_FAIL, message.c_str());
    }
};

OrtStatus* read_input(const OrtApi* api, const OrtKernelContext* context, size_t index, Tensor& tensor) {
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

// Allocates an output of the tensor's shape.
OrtStatus* open_output(const OrtApi* api, OrtKernelContext* context, size_t index, Tensor& tensor) {
    OrtValue* value = nullptr;
    TANGO_TRY(api->KernelContext_GetOutput(context, index, tensor.shape.data(), tensor.shape.size(), &value));
    return api->GetTensorMutableData(value, &tensor.data);
}

// Memory of the session where its first input is. It is free again with this object, while what uses it may still run:
// a session has one stream, so what takes it next runs after that.
class Workspace {
  public:
    Workspace(const OrtApi* api, const OrtKernelContext* context) : api_(api), context_(context) {}
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    ~Workspace() {
        if (memory_ != nullptr) static_cast<void>(api_->AllocatorFree(allocator_, memory_));
        if (allocator_ != nullptr) api_->ReleaseAllocator(allocator_);
    }

    OrtStatus* open(size_t bytes, void** memory) {
        const OrtValue* input = nullptr;
        const OrtMemoryInfo* where = nullptr;
        TANGO_TRY(api_->KernelContext_GetInput(context_, 0, &input));
        TANGO_TRY(api_->GetTensorMemoryInfo(input, &where));
        TANGO_TRY(api_->KernelContext_GetAllocator(context_, where, &allocator_));
        TANGO_TRY(api_->AllocatorAlloc(allocator_, bytes, &memory_));
        return *memory = memory_, nullptr;
    }

  private:
    const OrtApi* api_;
    const OrtKernelContext* context_;
    OrtAllocator* allocator_ = nullptr;
    void* memory_ = nullptr;
};

OrtStatus* compute(const Kernel& kernel, OrtKernelContext* context) {
    const tango::Operator& op = *kernel.custom->op;
    const tango::Signature& signature = *kernel.custom->signature;
    std::vector<Tensor> inputs(signature.inputs.size()), outputs(signature.outputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) TANGO_TRY(read_input(kernel.api, context, i, inputs[i]));
    for (size_t i = 0; i < outputs.size(); ++i) {
        outputs[i].shape = op.shape(i, inputs, kernel.attributes);
        TANGO_TRY(open_output(kernel.api, context, i, outputs[i]));
    }
    void* stream = nullptr;
    TANGO_TRY(kernel.api->KernelContext_GetGPUComputeStream(context, &stream));
    tango::Call call{signature, kernel.attributes, inputs, outputs, stream, kernel.custom->interleaved};
    if (op.workspace != nullptr) TANGO_TRY(kernel.convert(op.workspace(call, &call.workspace_bytes)));
    Workspace workspace(kernel.api, context);
    if (call.workspace_bytes > 0) TANGO_TRY(workspace.open(call.workspace_bytes, &call.workspace));
    return kernel.convert(op.run(call));
}

OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** made) {
    Kernel kernel{&cast(op), api};
    for (const tango::Attribute& attribute : kernel.custom->op->attributes) {
        tango::Value value;
        if (attribute.is_float) {
            TANGO_TRY(api->KernelInfoGetAttribute_float(info, attribute.name, &value.real));
        } else {
            TANGO_TRY(api->KernelInfoGetAttribute_int64(info, attribute.name, &value.integer));
        }
        kernel.attributes.push_back(value);
    }
    *made = new Kernel(kernel);
    return nullptr;
}

ONNXTensorElementDataType convert(Type type) {
    switch (type) {
        case Type::kHalf: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        case Type::kFloat: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        case Type::kFp8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN;
        case Type::kInt8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
        case Type::kUint8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
        case Type::kInt32: break;
    }
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
}

CustomOp make(const tango::Operator& op, const tango::Signature& signature, bool interleaved) {
    CustomOp made = {};
    made.op = &op, made.signature = &signature, made.interleaved = interleaved;
    made.version = kVersion;
    made.GetName = [](const OrtCustomOp* op) { return cast(op).op->name; };
    made.GetExecutionProviderType = [](const OrtCustomOp*) { return TANGO_ONNXRUNTIME_PROVIDER; };
    made.GetInputType = [](const OrtCustomOp* op, size_t index) { return convert(cast(op).signature->inputs[index]); };
    made.GetInputTypeCount = [](const OrtCustomOp* op) { return cast(op).signature->inputs.size(); };
    made.GetOutputType = [](const OrtCustomOp* op, size_t index) {
        return convert(cast(op).signature->outputs[index]);
    };
    made.GetOutputTypeCount = [](const OrtCustomOp* op) { return cast(op).signature->outputs.size(); };
    made.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    made.GetOutputCharacteristic = made.GetInputCharacteristic;
    made.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    made.CreateKernelV2 = create;
    made.KernelComputeV2 = [](void* opaque, OrtKernelContext* context) {
        const Kernel& kernel = *static_cast<const Kernel*>(opaque);
        try {
            return compute(kernel, context);
        } catch (const std::bad_alloc&) {
            return kernel.api->CreateStatus(ORT_FAIL, "the host has no memory left");
        }
    };
    made.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return made;
}

std::vector<CustomOp> make_all(bool interleaved) {
    std::vector<CustomOp> all;
    for (const tango::Operator& op : tango::operators())
        for (const tango::Signature& signature : op.signatures) all.push_back(make(op, signature, interleaved));
    return all;
}

// The domain, created once per process. It is never freed, because sessions refer to it.
template <bool kInterleaves>
OrtStatus* open_domain(const OrtApi* api, OrtCustomOpDomain** opened) {
    static const std::vector<CustomOp>& all = *new std::vector<CustomOp>(make_all(kInterleaves));
    static OrtCustomOpDomain* domain = nullptr;
    static std::mutex opening;
    const std::lock_guard<std::mutex> lock(opening);
    if (domain == nullptr) {
        OrtCustomOpDomain* made = nullptr;
        TANGO_TRY(api->CreateCustomOpDomain("tango", &made));
        for (const CustomOp& op : all) TANGO_TRY(api->CustomOpDomain_Add(made, &op));
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
    int interleaved = 0;
    TANGO_TRY(api->HasSessionConfigEntry(options, kInterleaved, &interleaved));
    OrtCustomOpDomain* domain = nullptr;
    TANGO_TRY(interleaved != 0 ? open_domain<true>(api, &domain) : open_domain<false>(api, &domain));
    return api->AddCustomOpDomain(options, domain);
}
