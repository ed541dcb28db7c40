// What ONNX Runtime's operators lack, as its custom operators on the GPU. A session that registers the library
// (SessionOptions.register_custom_ops_library) finds them in the domain "tango":
//
//   Bias(x [..., C], bias [C]) -> y,   BiasFastGelu likewise,   SwiGLU(gate, up) -> y                 tango/activate.h
//   CachedAttention(packed [1, T, (H + 2 G) d], bias, past_key [1, G, P, d], past_value, last [1], total [1], cosines,
//       sines; num_heads = H, kv_num_heads = G) -> mixed [1, T, H d], present_key, present_value      tango/attention.h
//
// The first three for fp16 and fp32: two operators of one name, of which a session takes the one that fits. Attention
// is for fp16; past and present are the same memory, and `total` is there for other implementations. No arithmetic here.
#include <mutex>
#include <string>
#include <vector>

#include "onnxruntime_interface.h"
#include "tango/activate.h"
#include "tango/attention.h"

namespace {

#ifndef TANGO_ONNXRUNTIME_PROVIDER  // a test runs the operators on a CPU
#define TANGO_ONNXRUNTIME_PROVIDER "CUDAExecutionProvider"
#endif

#define TANGO_TRY(call) \
    if (OrtStatus* status = (call)) return status

constexpr uint32_t kVersion = 16;
constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
               kInt32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;

struct Kernel;

struct Operator : OrtCustomOp {
    const char* name;
    OrtStatus* (*compute)(const Kernel& kernel, OrtKernelContext* context);
    std::vector<ONNXTensorElementDataType> inputs, outputs;
    size_t on_host = SIZE_MAX;  // the input that stays on the host, if there is one
    bool has_heads = false;     // the attributes num_heads and kv_num_heads
};

// An operator of a graph.
struct Kernel {
    const Operator* op;
    const OrtApi* api;
    int64_t heads = 0, kv_heads = 0;

    OrtStatus* refuse(const std::string& why, OrtErrorCode code = ORT_INVALID_ARGUMENT) const {
        return api->CreateStatus(code, (std::string("tango.") + op->name + ": " + why).c_str());
    }

    // What a function of the library gave back.
    OrtStatus* passed(int status) const {
        if (status == TANGO_OK) return nullptr;
        return refuse(tango_last_error(), status == TANGO_BAD_ARGUMENT ? ORT_INVALID_ARGUMENT : ORT_FAIL);
    }
};

struct Tensor {
    void* data = nullptr;
    std::vector<int64_t> shape;

    // Of the end of the shape: at(1) is the last length.
    int64_t at(size_t from_end) const { return from_end > shape.size() ? 1 : shape[shape.size() - from_end]; }
    int64_t size() const {
        int64_t size = 1;
        for (int64_t length : shape) size *= length;
        return size;
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

// Memory of an output, of a shape that is given.
OrtStatus* open_output(const OrtApi* api, OrtKernelContext* context, size_t index, Tensor& tensor) {
    OrtValue* value = nullptr;
    TANGO_TRY(api->KernelContext_GetOutput(context, index, tensor.shape.data(), tensor.shape.size(), &value));
    return api->GetTensorMutableData(value, &tensor.data);
}

// Two tensors of one type, of which the second is like the first, or one of its rows.
struct Pair {
    Tensor a, b, y;
    int64_t rows = 0;
    int32_t dtype = 0;
    void* stream = nullptr;

    OrtStatus* read(const Kernel& kernel, OrtKernelContext* context, bool is_row) {
        TANGO_TRY(read_input(kernel.api, context, 0, a));
        TANGO_TRY(read_input(kernel.api, context, 1, b));
        if (is_row ? b.shape != std::vector<int64_t>{a.at(1)} : b.shape != a.shape)
            return kernel.refuse("the shapes of the inputs do not fit");
        y.shape = a.shape;
        TANGO_TRY(open_output(kernel.api, context, 0, y));
        TANGO_TRY(kernel.api->KernelContext_GetGPUComputeStream(context, &stream));
        rows = a.at(1) == 0 ? 0 : a.size() / a.at(1);
        dtype = kernel.op->inputs[0] == kHalf ? TANGO_FP16 : TANGO_FP32;
        return nullptr;
    }
};

using EnqueueRows = int (*)(int32_t, const void*, const void*, int64_t, int64_t, void*, void*);

template <EnqueueRows kEnqueue>
OrtStatus* compute_rows(const Kernel& kernel, OrtKernelContext* context) {
    Pair pair;
    TANGO_TRY(pair.read(kernel, context, true));
    if (pair.rows == 0) return nullptr;
    return kernel.passed(
        kEnqueue(pair.dtype, pair.a.data, pair.b.data, pair.rows, pair.a.at(1), pair.y.data, pair.stream));
}

OrtStatus* compute_swiglu(const Kernel& kernel, OrtKernelContext* context) {
    Pair pair;
    TANGO_TRY(pair.read(kernel, context, false));
    return kernel.passed(
        tango_swiglu_enqueue(pair.dtype, pair.a.data, pair.b.data, pair.a.size(), pair.y.data, pair.stream));
}

enum { kPacked, kBias, kPastKey, kPastValue, kLast, kTotal, kCosines, kSines, kInputs };

OrtStatus* compute_attention(const Kernel& kernel, OrtKernelContext* context) {
    const OrtApi* api = kernel.api;
    Tensor in[kInputs], mixed, key, value;
    for (size_t i = 0; i < kInputs; ++i) TANGO_TRY(read_input(api, context, i, in[i]));
    const int64_t tokens = in[kPacked].at(2), capacity = in[kPastKey].at(2), width = in[kPastKey].at(1);
    const std::vector<int64_t> cache = {1, kernel.kv_heads, capacity, width};
    const int64_t columns = (kernel.heads + 2 * kernel.kv_heads) * width;
    if (in[kPacked].shape != std::vector<int64_t>{1, tokens, columns} || in[kBias].size() != columns ||
        in[kPastKey].shape != cache || in[kPastValue].shape != cache || in[kLast].size() != 1 ||
        in[kCosines].shape != in[kSines].shape || in[kCosines].at(1) != width / 2 || in[kCosines].at(2) < capacity)
        return kernel.refuse("the shapes of the inputs do not fit");
    mixed.shape = {1, tokens, kernel.heads * width}, key.shape = value.shape = cache;
    TANGO_TRY(open_output(api, context, 0, mixed));
    TANGO_TRY(open_output(api, context, 1, key));
    TANGO_TRY(open_output(api, context, 2, value));
    if (key.data != in[kPastKey].data || value.data != in[kPastValue].data)
        return kernel.refuse("past and present must be the same memory");
    void* stream = nullptr;
    TANGO_TRY(api->KernelContext_GetGPUComputeStream(context, &stream));
    const int64_t lengths[] = {tokens, kernel.heads, kernel.kv_heads, width, capacity};
    for (int64_t length : lengths)
        if (length < 1 || length > INT32_MAX) return kernel.refuse("a length is out of range");
    TangoAttentionShape shape = {};
    int32_t* const to[] = {&shape.tokens, &shape.heads, &shape.kv_heads, &shape.head_width, &shape.capacity};
    for (size_t i = 0; i < 5; ++i) *to[i] = static_cast<int32_t>(lengths[i]);
    const TangoAttentionTensors tensors = {in[kPacked].data,  in[kBias].data,  static_cast<int32_t*>(in[kLast].data),
                                           in[kCosines].data, in[kSines].data, key.data,
                                           value.data,        mixed.data};
    return kernel.passed(tango_attention_enqueue(&shape, &tensors, stream));
}

const Operator& cast(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }

OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** made) {
    Kernel kernel{&cast(op), api};
    if (kernel.op->has_heads) {
        TANGO_TRY(api->KernelInfoGetAttribute_int64(info, "num_heads", &kernel.heads));
        TANGO_TRY(api->KernelInfoGetAttribute_int64(info, "kv_num_heads", &kernel.kv_heads));
    }
    *made = new Kernel(kernel);
    return nullptr;
}

Operator make(const char* name, OrtStatus* (*compute)(const Kernel&, OrtKernelContext*),
              std::vector<ONNXTensorElementDataType> inputs, std::vector<ONNXTensorElementDataType> outputs) {
    Operator made = {};
    made.name = name, made.compute = compute, made.inputs = inputs, made.outputs = outputs;
    made.version = kVersion;
    made.GetName = [](const OrtCustomOp* op) { return cast(op).name; };
    made.GetExecutionProviderType = [](const OrtCustomOp*) { return TANGO_ONNXRUNTIME_PROVIDER; };
    made.GetInputType = [](const OrtCustomOp* op, size_t index) { return cast(op).inputs[index]; };
    made.GetInputTypeCount = [](const OrtCustomOp* op) { return cast(op).inputs.size(); };
    made.GetOutputType = [](const OrtCustomOp* op, size_t index) { return cast(op).outputs[index]; };
    made.GetOutputTypeCount = [](const OrtCustomOp* op) { return cast(op).outputs.size(); };
    made.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    made.GetOutputCharacteristic = made.GetInputCharacteristic;
    made.GetInputMemoryType = [](const OrtCustomOp* op, size_t index) {
        return index == cast(op).on_host ? OrtMemTypeCPUInput : OrtMemTypeDefault;
    };
    made.CreateKernelV2 = create;
    made.KernelComputeV2 = [](void* opaque, OrtKernelContext* context) {
        const Kernel& kernel = *static_cast<const Kernel*>(opaque);
        try {
            return kernel.op->compute(kernel, context);
        } catch (const std::bad_alloc&) {
            return kernel.api->CreateStatus(ORT_FAIL, "the host has no memory left");
        }
    };
    made.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return made;
}

std::vector<Operator> make_all() {
    std::vector<Operator> all;
    for (auto type : {kHalf, kFloat}) {
        all.push_back(make("Bias", compute_rows<tango_bias_enqueue>, {type, type}, {type}));
        all.push_back(make("BiasFastGelu", compute_rows<tango_bias_gelu_enqueue>, {type, type}, {type}));
        all.push_back(make("SwiGLU", compute_swiglu, {type, type}, {type}));
    }
    all.push_back(make("CachedAttention", compute_attention,
                       {kHalf, kHalf, kHalf, kHalf, kInt32, kInt32, kHalf, kHalf}, {kHalf, kHalf, kHalf}));
    all.back().on_host = kTotal;
    all.back().has_heads = true;
    return all;
}

// One for the process, never freed: sessions refer to it as long as they live.
OrtStatus* open_domain(const OrtApi* api, OrtCustomOpDomain** opened) {
    static const std::vector<Operator>& operators = *new std::vector<Operator>(make_all());
    static OrtCustomOpDomain* domain = nullptr;
    static std::mutex opening;
    const std::lock_guard<std::mutex> lock(opening);
    if (domain == nullptr) {
        OrtCustomOpDomain* made = nullptr;
        TANGO_TRY(api->CreateCustomOpDomain("tango", &made));
        for (const Operator& op : operators) TANGO_TRY(api->CustomOpDomain_Add(made, &op));
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
