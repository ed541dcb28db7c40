// Custom operators of ONNX Runtime on the GPU. A session that registers the library finds them in the domain "tango"
// (SessionOptions.register_custom_ops_library):
//
//   Bias(x [..., C], bias [C]) -> y tango/activation.h BiasFastGelu(x [..., C], bias [C]) -> y SwiGLU(gate, up) -> y
//   CachedAttention(qkv [1, T, (H + 2 G) d], bias, past_key [1, G, P, d], past_value, last [1], total [1], cosines,
//       sines; num_heads = H, kv_num_heads = G) -> attn_out [1, T, H d], present_key, present_value tango/attention.h
//
// The first three take fp16 and fp32: there are two operators of each name, and a session takes the one that fits.
// Attention takes fp16; past and present must be the same memory. Only other implementations use `total`.
#include <mutex>
#include <string>
#include <vector>

#include "interface.h"
#include "tango/activation.h"
#include "tango/attention.h"

namespace {

#ifndef TANGO_ONNXRUNTIME_PROVIDER  // tests run the operators on a CPU
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
    size_t host_input = SIZE_MAX;  // index of the input in host memory, if there is one
    bool has_heads = false;        // has the attributes num_heads and kv_num_heads
};

// An operator as a node of a graph.
struct Kernel {
    const Operator* op;
    const OrtApi* api;
    int64_t heads = 0, kv_heads = 0;

    OrtStatus* fail(const std::string& message, OrtErrorCode code = ORT_INVALID_ARGUMENT) const {
        return api->CreateStatus(code, (std::string("tango.") + op->name + ": " + message).c_str());
    }

    // Converts a TangoStatus.
    OrtStatus* convert(int status) const {
        if (status == TANGO_OK) return nullptr;
        return fail(tango_last_error(), status == TANGO_BAD_ARGUMENT ? ORT_INVALID_ARGUMENT : ORT_FAIL);
    }
};

struct Tensor {
    void* data = nullptr;
    std::vector<int64_t> shape;

    // A length counted from the end of the shape: dim(1) is the last one.
    int64_t dim(size_t from_end) const { return from_end > shape.size() ? 1 : shape[shape.size() - from_end]; }
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

// Allocates an output of the tensor's shape.
OrtStatus* open_output(const OrtApi* api, OrtKernelContext* context, size_t index, Tensor& tensor) {
    OrtValue* value = nullptr;
    TANGO_TRY(api->KernelContext_GetOutput(context, index, tensor.shape.data(), tensor.shape.size(), &value));
    return api->GetTensorMutableData(value, &tensor.data);
}

// Two inputs of one type and an output. The second input has the shape of the first, or of one of its rows.
struct Pair {
    Tensor a, b, y;
    int64_t rows = 0;
    int32_t dtype = 0;
    void* stream = nullptr;

    OrtStatus* read(const Kernel& kernel, OrtKernelContext* context, bool is_row) {
        TANGO_TRY(read_input(kernel.api, context, 0, a));
        TANGO_TRY(read_input(kernel.api, context, 1, b));
        if (is_row ? b.shape != std::vector<int64_t>{a.dim(1)} : b.shape != a.shape)
            return kernel.fail("the shapes of the inputs do not match");
        y.shape = a.shape;
        TANGO_TRY(open_output(kernel.api, context, 0, y));
        TANGO_TRY(kernel.api->KernelContext_GetGPUComputeStream(context, &stream));
        rows = a.dim(1) == 0 ? 0 : a.size() / a.dim(1);
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
    return kernel.convert(
        kEnqueue(pair.dtype, pair.a.data, pair.b.data, pair.rows, pair.a.dim(1), pair.y.data, pair.stream));
}

int enqueue_gelu_tanh(int32_t dtype, const void* x, const void* bias, int64_t rows, int64_t width, void* y,
                      void* stream) {
    return tango_bias_gelu_enqueue(dtype, TANGO_GELU_TANH, x, bias, rows, width, y, stream);
}

OrtStatus* compute_swiglu(const Kernel& kernel, OrtKernelContext* context) {
    Pair pair;
    TANGO_TRY(pair.read(kernel, context, false));
    return kernel.convert(
        tango_swiglu_enqueue(pair.dtype, pair.a.data, pair.b.data, pair.a.size(), pair.y.data, pair.stream));
}

enum { kQkv, kBias, kPastKey, kPastValue, kLast, kTotal, kCosines, kSines, kInputs };

OrtStatus* compute_attention(const Kernel& kernel, OrtKernelContext* context) {
    const OrtApi* api = kernel.api;
    Tensor in[kInputs], attn_out, key, value;
    for (size_t i = 0; i < kInputs; ++i) TANGO_TRY(read_input(api, context, i, in[i]));
    const int64_t tokens = in[kQkv].dim(2), capacity = in[kPastKey].dim(2), width = in[kPastKey].dim(1);
    const std::vector<int64_t> cache = {1, kernel.kv_heads, capacity, width};
    const int64_t columns = (kernel.heads + 2 * kernel.kv_heads) * width;
    if (in[kQkv].shape != std::vector<int64_t>{1, tokens, columns} || in[kBias].size() != columns ||
        in[kPastKey].shape != cache || in[kPastValue].shape != cache || in[kLast].size() != 1 ||
        in[kCosines].shape != in[kSines].shape || in[kCosines].dim(1) != width / 2 || in[kCosines].dim(2) < capacity)
        return kernel.fail("the shapes of the inputs do not match");
    attn_out.shape = {1, tokens, kernel.heads * width}, key.shape = value.shape = cache;
    TANGO_TRY(open_output(api, context, 0, attn_out));
    TANGO_TRY(open_output(api, context, 1, key));
    TANGO_TRY(open_output(api, context, 2, value));
    if (key.data != in[kPastKey].data || value.data != in[kPastValue].data)
        return kernel.fail("past and present must be the same memory");
    void* stream = nullptr;
    TANGO_TRY(api->KernelContext_GetGPUComputeStream(context, &stream));
    const int64_t lengths[] = {tokens, kernel.heads, kernel.kv_heads, width, capacity};
    for (int64_t length : lengths)
        if (length < 1 || length > INT32_MAX) return kernel.fail("a length is out of range");
    TangoAttentionShape shape = {};
    int32_t* const to[] = {&shape.tokens, &shape.heads, &shape.kv_heads, &shape.head_dim, &shape.capacity};
    for (size_t i = 0; i < 5; ++i) *to[i] = static_cast<int32_t>(lengths[i]);
    const TangoAttentionTensors tensors = {in[kQkv].data,     in[kBias].data,  static_cast<int32_t*>(in[kLast].data),
                                           in[kCosines].data, in[kSines].data, key.data,
                                           value.data,        attn_out.data};
    return kernel.convert(tango_attention_enqueue(&shape, &tensors, stream));
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
        return index == cast(op).host_input ? OrtMemTypeCPUInput : OrtMemTypeDefault;
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
        all.push_back(make("BiasFastGelu", compute_rows<enqueue_gelu_tanh>, {type, type}, {type}));
        all.push_back(make("SwiGLU", compute_swiglu, {type, type}, {type}));
    }
    all.push_back(make("CachedAttention", compute_attention, {kHalf, kHalf, kHalf, kHalf, kInt32, kInt32, kHalf, kHalf},
                       {kHalf, kHalf, kHalf}));
    all.back().host_input = kTotal;
    all.back().has_heads = true;
    return all;
}

// The domain, created once per process. It is never freed, because sessions refer to it as long as they live.
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
