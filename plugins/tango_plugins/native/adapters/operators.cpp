#include "operators.h"

#include <algorithm>
#include <climits>
#include <cstring>

#include "common/check.h"
#include "tango/activation.h"
#include "tango/attention.h"
#include "tango/fp8.h"
#include "tango/linear.h"
#include "tango/norm.h"
#include "tango/patch_rotation.h"
#include "tango/patches.h"
#include "tango/vision_attention.h"

namespace tango {
namespace {

constexpr Type kHalf = Type::kHalf, kFloat = Type::kFloat, kFp8 = Type::kFp8;
constexpr Type kInt32 = Type::kInt32, kInt8 = Type::kInt8, kUint8 = Type::kUint8;

int mismatch() { return fail(TANGO_BAD_ARGUMENT, "the shapes of the inputs do not match"); }

int32_t dtype(Type type) {
    return type == kHalf ? TANGO_FP16 : type == kFp8 ? TANGO_FP8 : type == kInt8 ? TANGO_INT8 : TANGO_FP32;
}

// Whether the first output is FP8 or INT8. Its scale is the last attribute then.
bool quantizes(const Call& call) { return is_quantized(dtype(call.signature.outputs[0])); }

float y_scale(const Call& call) { return quantizes(call) ? call.attributes.back().real : 1.0f; }

// Copies lengths to 32 bits.
int narrow(const std::vector<std::pair<int64_t, int32_t*>>& lengths) {
    for (const auto& [length, to] : lengths) {
        if (length < 0 || length > INT32_MAX) return fail(TANGO_BAD_ARGUMENT, "a length is out of range");
        *to = static_cast<int32_t>(length);
    }
    return TANGO_OK;
}

// Whether the last axis holds queries, keys and values of so many heads.
bool is_packed(const Tensor& qkv, int64_t heads) {
    return heads >= 1 && qkv.dim(1) % 3 == 0 && qkv.dim(1) / 3 % heads == 0;
}

bool is_row_of(const Tensor& row, const Tensor& x) { return row.shape == Lengths{x.dim(1)}; }

int enqueue_bias(const Call& call) {
    const Tensor &x = call.inputs[0], &bias = call.inputs[1];
    if (!is_row_of(bias, x)) return mismatch();
    if (x.size() == 0) return TANGO_OK;
    return tango_bias_enqueue(dtype(call.signature.inputs[0]), x.data, bias.data, x.rows(), x.dim(1),
                              call.outputs[0].data, call.stream);
}

template <TangoGelu kGelu>
int enqueue_bias_gelu(const Call& call) {
    const Tensor &x = call.inputs[0], &bias = call.inputs[1];
    if (!is_row_of(bias, x)) return mismatch();
    if (x.size() == 0) return TANGO_OK;
    return tango_bias_gelu_enqueue(dtype(call.signature.inputs[0]), kGelu, x.data, bias.data, x.rows(), x.dim(1),
                                   dtype(call.signature.outputs[0]), y_scale(call), call.outputs[0].data, call.stream);
}

int enqueue_swiglu(const Call& call) {
    const Tensor &gate = call.inputs[0], &up = call.inputs[1];
    if (gate.shape != up.shape) return mismatch();
    if (gate.size() == 0) return TANGO_OK;
    return tango_swiglu_enqueue(dtype(call.signature.inputs[0]), gate.data, up.data, gate.size(),
                                dtype(call.signature.outputs[0]), y_scale(call), call.outputs[0].data, call.stream);
}

int enqueue_bias_swiglu(const Call& call) {
    const Tensor &gate = call.inputs[0], &gate_bias = call.inputs[1], &up = call.inputs[2], &up_bias = call.inputs[3];
    if (gate.shape != up.shape || !is_row_of(gate_bias, gate) || !is_row_of(up_bias, up)) return mismatch();
    if (gate.size() == 0) return TANGO_OK;
    return tango_bias_swiglu_enqueue(
        dtype(call.signature.inputs[0]), gate.data, gate_bias.data, up.data, up_bias.data, gate.rows(), gate.dim(1),
        call.attributes[0].real, dtype(call.signature.outputs[0]), y_scale(call), call.outputs[0].data, call.stream);
}

using EnqueueNorm = int (*)(const TangoNormShape*, const TangoNormTensors*, void*);

// Inputs: the residual stream; where kBranch, what is added to it, with its bias where kBias; weight, and beta where
// kBeta. Outputs: y, and the sum where kBranch.
template <EnqueueNorm kEnqueue, bool kBranch, bool kBias, bool kBeta>
int enqueue_norm(const Call& call) {
    const std::vector<Tensor>& in = call.inputs;
    const Tensor& residual = in[0];
    constexpr size_t kWeight = 1 + kBranch + kBias;
    if (kBranch && in[1].shape != residual.shape) return mismatch();
    for (size_t i = 1 + kBranch; i < in.size(); ++i)
        if (!is_row_of(in[i], residual)) return mismatch();
    if (residual.size() == 0) return TANGO_OK;
    TangoNormShape shape = {};
    if (int status = narrow({{residual.rows(), &shape.rows}, {residual.dim(1), &shape.width}})) return status;
    shape.stream_dtype = dtype(call.signature.inputs[0]);
    shape.branch_dtype = dtype(call.signature.inputs[kBranch ? 1 : 0]);
    shape.bias_dtype = dtype(call.signature.inputs[kBias ? 2 : 0]);
    shape.y_dtype = dtype(call.signature.outputs[0]);
    shape.epsilon = call.attributes[0].real;
    const size_t scales = call.attributes.size() - quantizes(call);  // but for that of y
    shape.branch_scale = scales > 1 ? call.attributes[1].real : 1.0f;
    shape.y_scale = y_scale(call);
    TangoNormTensors tensors = {};
    tensors.residual = residual.data;
    if (kBranch) tensors.branch = in[1].data, tensors.sum = call.outputs[1].data;
    if (kBias) tensors.bias = in[2].data;
    tensors.weight = static_cast<const float*>(in[kWeight].data);
    if (kBeta) tensors.beta = static_cast<const float*>(in[kWeight + 1].data);
    tensors.y = call.outputs[0].data;
    return kEnqueue(&shape, &tensors, call.stream);
}

int enqueue_patches(const Call& call) {
    const Tensor &pixels = call.inputs[0], &mean = call.inputs[1], &deviation = call.inputs[2];
    if (pixels.shape.size() != 5 || pixels.dim(1) != 3 || mean.shape != Lengths{3} || deviation.shape != mean.shape)
        return mismatch();
    if (pixels.size() == 0) return TANGO_OK;
    TangoPatchesShape shape = {};
    if (int status = narrow({{pixels.dim(5), &shape.frames},
                             {pixels.dim(4), &shape.steps},
                             {pixels.dim(3), &shape.rows},
                             {pixels.dim(2), &shape.columns},
                             {call.attributes[0].integer, &shape.size}}))
        return status;
    const TangoPatchesTensors tensors = {pixels.data, static_cast<const float*>(mean.data),
                                         static_cast<const float*>(deviation.data), call.outputs[0].data};
    return tango_patches_enqueue(&shape, &tensors, call.stream);
}

// Where the parts of a packed row, and those of a bias, begin.
const void* part_of(const Tensor& packed, int part) {
    return static_cast<const char*>(packed.data) + part * (packed.dim(1) / 3) * sizeof(uint16_t);
}

// Fills in what all attention of a tower takes of query, key and value of a token one after the other; `rows` and
// `columns` are of the grid.
int describe_attention(const Tensor& qkv, int64_t heads, int64_t rows, int64_t columns,
                       TangoVisionAttentionShape& shape) {
    const int64_t width = qkv.dim(1) / 3;
    if (int status = narrow({{qkv.shape[0], &shape.frames},
                             {rows, &shape.rows},
                             {columns, &shape.columns},
                             {heads, &shape.heads},
                             {width / heads, &shape.head_dim},
                             {3 * width, &shape.query_stride}}))
        return status;
    shape.key_stride = shape.value_stride = shape.query_stride;
    return TANGO_OK;
}

int enqueue_vision_attention(const Call& call) {
    const Tensor &qkv = call.inputs[0], &bias = call.inputs[1];
    const int64_t heads = call.attributes[0].integer;
    if (qkv.shape.size() != 3 || !is_packed(qkv, heads) || !is_row_of(bias, qkv)) return mismatch();
    if (qkv.size() == 0) return TANGO_OK;
    TangoVisionAttentionShape shape = {};
    if (int status = describe_attention(qkv, heads, 1, qkv.dim(2), shape)) return status;
    const TangoVisionAttentionTensors tensors = {part_of(qkv, 0),  part_of(qkv, 1),  part_of(qkv, 2),
                                                 part_of(bias, 0), part_of(bias, 1), part_of(bias, 2),
                                                 nullptr,          nullptr,          call.outputs[0].data};
    return tango_vision_attention_enqueue(&shape, &tensors, call.stream);
}

// Whether cosines and sines are those of so many tokens' heads.
bool is_angles(const Tensor& cosines, const Tensor& sines, int64_t tokens, int64_t head_dim) {
    return cosines.shape == Lengths{tokens, head_dim / 2} && sines.shape == cosines.shape;
}

// Inputs: qkv, bias, cosines, sines. Outputs: queries and keys.
int enqueue_patch_rotation(const Call& call) {
    const Tensor &qkv = call.inputs[0], &bias = call.inputs[1], &cosines = call.inputs[2], &sines = call.inputs[3];
    const int64_t heads = call.attributes[0].integer, width = qkv.dim(1) / 3;
    if (qkv.shape.size() != 3 || !is_packed(qkv, heads) || !is_row_of(bias, qkv) ||
        !is_angles(cosines, sines, qkv.dim(2), width / heads))
        return mismatch();
    if (qkv.size() == 0) return TANGO_OK;
    TangoPatchRotationShape shape = {};
    if (int status = narrow({{qkv.dim(3), &shape.frames},
                             {qkv.dim(2), &shape.tokens},
                             {heads, &shape.heads},
                             {width / heads, &shape.head_dim}}))
        return status;
    shape.dtype = dtype(call.signature.outputs[0]);
    const TangoPatchRotationTensors tensors = {qkv.data,
                                               bias.data,
                                               static_cast<const float*>(cosines.data),
                                               static_cast<const float*>(sines.data),
                                               call.outputs[0].data,
                                               call.outputs[1].data};
    return tango_patch_rotation_enqueue(&shape, &tensors, call.stream);
}

// Inputs: rotated queries and keys; qkv, of which the values are read, and its bias.
int enqueue_frame_attention(const Call& call) {
    const Tensor &query = call.inputs[0], &key = call.inputs[1], &qkv = call.inputs[2], &bias = call.inputs[3];
    const int64_t heads = call.attributes[0].integer, width = qkv.dim(1) / 3;
    if (qkv.shape.size() != 3 || !is_packed(qkv, heads) || !is_row_of(bias, qkv) ||
        query.shape != Lengths{qkv.dim(3), qkv.dim(2), width} || key.shape != query.shape)
        return mismatch();
    if (qkv.size() == 0) return TANGO_OK;
    TangoVisionAttentionShape shape = {};
    if (int status = describe_attention(qkv, heads, 1, qkv.dim(2), shape)) return status;
    shape.query_stride = shape.key_stride = static_cast<int32_t>(width);
    const TangoVisionAttentionTensors tensors = {query.data, key.data, part_of(qkv, 2),
                                                 nullptr,    nullptr,  part_of(bias, 2),
                                                 nullptr,    nullptr,  call.outputs[0].data};
    return tango_vision_attention_enqueue(&shape, &tensors, call.stream);
}

// Inputs: qkv, bias, cosines, sines.
int enqueue_window_attention(const Call& call) {
    const Tensor &qkv = call.inputs[0], &bias = call.inputs[1], &cosines = call.inputs[2], &sines = call.inputs[3];
    const int64_t heads = call.attributes[0].integer;
    if (qkv.shape.size() != 4 || !is_packed(qkv, heads) || !is_row_of(bias, qkv) ||
        !is_angles(cosines, sines, qkv.dim(3) * qkv.dim(2), qkv.dim(1) / 3 / heads))
        return mismatch();
    if (qkv.size() == 0) return TANGO_OK;
    TangoVisionAttentionShape shape = {};
    if (int status = describe_attention(qkv, heads, qkv.dim(3), qkv.dim(2), shape)) return status;
    if (int status = narrow({{call.attributes[1].integer, &shape.window}})) return status;
    const TangoVisionAttentionTensors tensors = {part_of(qkv, 0),
                                                 part_of(qkv, 1),
                                                 part_of(qkv, 2),
                                                 part_of(bias, 0),
                                                 part_of(bias, 1),
                                                 part_of(bias, 2),
                                                 static_cast<const float*>(cosines.data),
                                                 static_cast<const float*>(sines.data),
                                                 call.outputs[0].data};
    return tango_vision_attention_enqueue(&shape, &tensors, call.stream);
}

enum { kQkv, kBias, kPastKey, kPastValue, kLast, kCosines, kSines };

bool is_angles(const Tensor& cosines, const Tensor& sines, TangoAngles angles, int64_t tokens, int64_t capacity,
               int64_t head_dim) {
    if (cosines.shape != sines.shape || cosines.shape.size() != 2 || cosines.dim(1) != head_dim / 2) return false;
    return angles == TANGO_ANGLES_OF_TOKENS ? cosines.dim(2) == tokens : cosines.dim(2) >= capacity;
}

template <TangoAngles kAngles>
int enqueue_cached_attention(const Call& call) {
    const std::vector<Tensor>& in = call.inputs;
    const int64_t heads = call.attributes[0].integer, kv_heads = call.attributes[1].integer;
    const int64_t tokens = in[kQkv].dim(2), capacity = in[kPastKey].dim(2), width = in[kPastKey].dim(1);
    const Lengths cache = {kv_heads, capacity, width};
    const int64_t columns = (heads + 2 * kv_heads) * width;
    if (in[kQkv].shape != Lengths{tokens, columns} || in[kBias].shape != Lengths{columns} ||
        in[kPastKey].shape != cache || in[kPastValue].shape != cache || in[kLast].size() != 1 ||
        !is_angles(in[kCosines], in[kSines], kAngles, tokens, capacity, width))
        return mismatch();
    TangoAttentionShape shape = {};
    if (int status = narrow({{tokens, &shape.tokens},
                             {heads, &shape.heads},
                             {kv_heads, &shape.kv_heads},
                             {width, &shape.head_dim},
                             {capacity, &shape.capacity}}))
        return status;
    shape.angles = kAngles;
    const TangoAttentionTensors tensors = {
        in[kQkv].data,        in[kBias].data,      static_cast<int32_t*>(in[kLast].data),
        in[kCosines].data,    in[kSines].data,     call.outputs[1].data,
        call.outputs[2].data, call.outputs[0].data};
    return tango_attention_enqueue(&shape, &tensors, call.stream);
}

int describe_linear(const Tensor& x, int64_t outputs, TangoLinearShape& shape) {
    return narrow({{x.rows(), &shape.rows}, {x.dim(1), &shape.inputs}, {outputs, &shape.outputs}});
}

// Outputs are the length of an axis of the weight, counted from the end.
template <size_t kAxis>
int linear_workspace(const Call& call, size_t* bytes) {
    const Tensor& x = call.inputs[0];
    if (x.rows() == 0) return *bytes = 0, TANGO_OK;
    TangoLinearShape shape = {};
    if (int status = describe_linear(x, call.inputs[1].dim(kAxis), shape)) return status;
    return tango_linear_workspace(&shape, bytes);
}

// Activations are fp16, or INT8 with a scale as the attribute.
int enqueue_linear(const Call& call, int64_t outputs, const TangoMatrix& matrix) {
    const Tensor& x = call.inputs[0];
    if (x.rows() == 0) return TANGO_OK;
    TangoLinearShape shape = {};
    if (int status = describe_linear(x, outputs, shape)) return status;
    void* const y = call.outputs[0].data;
    if (call.signature.inputs[0] == kInt8)
        return tango_int8_linear_enqueue(&shape, &matrix, x.data, call.attributes[0].real, y, call.stream);
    return tango_linear_enqueue(&shape, &matrix, x.data, y, call.workspace, call.workspace_bytes, call.stream);
}

int enqueue_per_channel_linear(const Call& call) {
    const Tensor &x = call.inputs[0], &weight = call.inputs[1], &scales = call.inputs[2];
    const int64_t outputs = weight.dim(1);
    if (weight.shape != Lengths{x.dim(1), outputs} || scales.shape != Lengths{outputs}) return mismatch();
    return enqueue_linear(call, outputs, {weight.data, scales.data, nullptr, TANGO_WEIGHTS_INT8, 0, 0});
}

// With zero points where kZeros.
template <bool kZeros>
int enqueue_blockwise_linear(const Call& call) {
    const Tensor &x = call.inputs[0], &weight = call.inputs[1], &scales = call.inputs[2];
    const int64_t bits = call.attributes[0].integer, outputs = weight.dim(3), blocks = weight.dim(2);
    if (bits != 4 && bits != 8) return fail(TANGO_BAD_ARGUMENT, "bits must be 4 or 8");
    const int64_t group = weight.dim(1) * 8 / bits, zero_bytes = (blocks * bits + 7) / 8;
    if (weight.shape.size() != 3 || scales.shape != Lengths{outputs, blocks} || blocks * group < x.dim(1) ||
        (blocks - 1) * group >= x.dim(1))
        return mismatch();
    if (kZeros && call.inputs[3].shape != Lengths{outputs, zero_bytes}) return mismatch();
    const int32_t weights = bits == 4 ? TANGO_WEIGHTS_BLOCKS_4 : TANGO_WEIGHTS_BLOCKS_8;
    void* const zeros = kZeros ? call.inputs[3].data : nullptr;
    return enqueue_linear(call, outputs,
                          {weight.data, scales.data, zeros, weights,
                           static_cast<int16_t>(std::min<int64_t>(group, INT16_MAX)), call.interleaved});
}

int enqueue_quantize(const Call& call) {
    const Tensor& x = call.inputs[0];
    return tango_quantize_enqueue(dtype(call.signature.inputs[0]), x.data, x.size(), dtype(call.signature.outputs[0]),
                                  y_scale(call), call.outputs[0].data, call.stream);
}

// Inputs: x, weight; before a GELU bias.
template <bool kGelu>
int enqueue_fp16_linear(const Call& call) {
    const Tensor &x = call.inputs[0], &weight = call.inputs[1];
    const int64_t outputs = weight.dim(1);
    if (weight.shape != Lengths{x.dim(1), outputs}) return mismatch();
    if (kGelu && call.inputs[2].shape != Lengths{outputs}) return mismatch();
    if (x.rows() == 0) return TANGO_OK;
    TangoLinearShape shape = {};
    if (int status = describe_linear(x, outputs, shape)) return status;
    const TangoFp16LinearTensors tensors = {x.data, weight.data, kGelu ? call.inputs[2].data : nullptr,
                                            call.outputs[0].data};
    const auto enqueue = kGelu ? tango_fp16_linear_gelu_enqueue : tango_fp16_linear_enqueue;
    return enqueue(&shape, &tensors, call.stream);
}

// Inputs: x, weight, weight scale; before a GELU bias and factor.
template <bool kGelu>
int enqueue_fp8_linear(const Call& call) {
    const Tensor &x = call.inputs[0], &weight = call.inputs[1], &scale = call.inputs[2];
    if (weight.shape.size() != 2 || weight.dim(1) != x.dim(1) || scale.size() != 1) return mismatch();
    if (kGelu && (call.inputs[3].size() != weight.dim(2) || call.inputs[4].size() != 1)) return mismatch();
    if (x.rows() == 0) return TANGO_OK;
    TangoLinearShape shape = {};
    if (int status = describe_linear(x, weight.dim(2), shape)) return status;
    TangoFp8LinearTensors tensors = {};
    tensors.x = x.data, tensors.weight = weight.data, tensors.y = call.outputs[0].data;
    tensors.weight_scale = static_cast<const float*>(scale.data);
    if (kGelu) tensors.bias = call.inputs[3].data, tensors.y_factor = static_cast<const float*>(call.inputs[4].data);
    const auto enqueue = kGelu ? tango_fp8_linear_gelu_enqueue : tango_fp8_linear_enqueue;
    return enqueue(&shape, &tensors, call.attributes[0].real, call.stream);
}

// Inputs: qkv, bias, present key, last, cosines, sines of every position.
int enqueue_attention_shares(const Call& call) {
    const Tensor &qkv = call.inputs[0], &bias = call.inputs[1], &keys = call.inputs[2], &last = call.inputs[3];
    const Tensor &cosines = call.inputs[4], &sines = call.inputs[5];
    const int64_t heads = call.attributes[0].integer, kv_heads = call.attributes[1].integer;
    const int64_t tokens = qkv.dim(2), capacity = keys.dim(2), width = keys.dim(1);
    const int64_t columns = (heads + 2 * kv_heads) * width;
    if (qkv.shape != Lengths{tokens, columns} || bias.shape != Lengths{columns} ||
        keys.shape != Lengths{kv_heads, capacity, width} || last.size() != 1 ||
        !is_angles(cosines, sines, TANGO_ANGLES_OF_POSITIONS, tokens, capacity, width))
        return mismatch();
    TangoAttentionShape shape = {};
    if (int status = narrow({{tokens, &shape.tokens},
                             {heads, &shape.heads},
                             {kv_heads, &shape.kv_heads},
                             {width, &shape.head_dim},
                             {capacity, &shape.capacity}}))
        return status;
    TangoAttentionTensors tensors = {};
    tensors.qkv = qkv.data, tensors.bias = bias.data, tensors.last = static_cast<int32_t*>(last.data);
    tensors.cosines = cosines.data, tensors.sines = sines.data, tensors.keys = keys.data;
    return tango_attention_shares_enqueue(&shape, &tensors, static_cast<float*>(call.outputs[0].data), call.stream);
}

std::vector<Signature> rows_of_either_type() { return {{{kHalf, kHalf}, {kHalf}}, {{kFloat, kFloat}, {kFloat}}}; }

// A norm of the residual stream alone, with `after` more inputs in fp32.
std::vector<Signature> norm_of(size_t after) {
    std::vector<Signature> all;
    for (Type type : {kHalf, kFloat}) {
        all.push_back({{type}, {type}});
        all.back().inputs.resize(1 + after, kFloat);
    }
    return all;
}

// A norm that first adds a branch and `biases`. The stream may be in fp32 where the rest is in fp16.
std::vector<Signature> norm_of_sum(size_t biases, size_t after) {
    std::vector<Signature> all;
    for (auto [stream, branch] : {std::pair(kHalf, kHalf), std::pair(kFloat, kHalf), std::pair(kFloat, kFloat)}) {
        all.push_back({{stream, branch}, {branch, stream}});
        all.back().inputs.resize(2 + biases, branch);
        all.back().inputs.resize(2 + biases + after, kFloat);
    }
    return all;
}

// The same operator with its first output quantized.
Operator quantized(const char* name, Type type, Operator op) {
    op.name = name;
    op.attributes.push_back({"y_scale", true});
    std::vector<Signature> signatures;
    for (Signature& signature : op.signatures)
        if (signature.outputs[0] == kHalf) signature.outputs[0] = type, signatures.push_back(signature);
    op.signatures = signatures;
    return op;
}

std::vector<Operator> make_plain() {
    const OutputShape first{0};
    const Attribute bits{"bits", false}, size{"size", false};
    const Attribute epsilon{"epsilon", true}, scale{"scale", true}, x_scale{"x_scale", true}, y_scale{"y_scale", true};
    const Attribute heads{"num_heads", false}, kv_heads{"kv_num_heads", false}, window{"window", false};
    const Signature cached{{kHalf, kHalf, kHalf, kHalf, kInt32, kHalf, kHalf}, {kHalf, kHalf, kHalf}};
    const std::vector<OutputShape> cached_shapes{{-1, {{kQkv, 0}, {kPastKey, 2, 0}}}, {kPastKey}, {kPastValue}};
    const OutputShape part{-1, {{0, 0}, {0, 1}, {0, 2, -1, 3}}};  // query, key or value of qkv
    return {
        {"Bias", {}, rows_of_either_type(), {first}, {}, enqueue_bias},
        {"BiasGelu", {}, rows_of_either_type(), {first}, {}, enqueue_bias_gelu<TANGO_GELU_ERF>},
        {"BiasFastGelu", {}, rows_of_either_type(), {first}, {}, enqueue_bias_gelu<TANGO_GELU_TANH>},
        {"SwiGLU", {}, rows_of_either_type(), {first}, {}, enqueue_swiglu},
        {"LayerNorm", {epsilon}, norm_of(2), {first}, {}, enqueue_norm<tango_layer_norm_enqueue, false, false, true>},
        {"RMSNorm", {epsilon}, norm_of(1), {first}, {}, enqueue_norm<tango_rms_norm_enqueue, false, false, false>},
        {"AddLayerNorm",
         {epsilon},
         norm_of_sum(1, 2),
         {first, first},
         {},
         enqueue_norm<tango_layer_norm_enqueue, true, true, true>},
        {"AddRMSNorm",
         {epsilon},
         norm_of_sum(0, 1),
         {first, first},
         {},
         enqueue_norm<tango_rms_norm_enqueue, true, false, false>},
        {"BiasSwiGLU",
         {scale},
         {{{kHalf, kHalf, kHalf, kHalf}, {kHalf}}, {{kFloat, kFloat, kFloat, kFloat}, {kFloat}}},
         {first},
         {},
         enqueue_bias_swiglu},
        {"WideRMSNorm",
         {epsilon},
         {{{kFloat, kFloat}, {kHalf}}},
         {first},
         {},
         enqueue_norm<tango_rms_norm_enqueue, false, false, false>},
        {"AddWideRMSNorm",
         {epsilon, scale},
         {{{kFloat, kHalf, kHalf, kFloat}, {kHalf, kFloat}}, {{kFloat, kHalf, kFloat, kFloat}, {kHalf, kFloat}}},
         {first, first},
         {},
         enqueue_norm<tango_rms_norm_enqueue, true, true, false>},
        {"VisionAttention", {heads}, {{{kHalf, kHalf}, {kHalf}}}, {part}, {}, enqueue_vision_attention},
        {"Patches",
         {size},
         {{{kUint8, kFloat, kFloat}, {kHalf}}},
         {{-1, {{0, 0}, {0, 2, -1, 1, 0}, {0, 3, -1, 1, 0}, {0, 1}, {0, 4, 0, 3}, {0, 4, 0}}}},
         {},
         enqueue_patches},
        {"RotatePatches",
         {heads},
         {{{kHalf, kHalf, kFloat, kFloat}, {kHalf, kHalf}}},
         {part, part},
         {},
         enqueue_patch_rotation},
        {"RotateQueryKey",
         {heads},
         {{{kHalf, kHalf, kFloat, kFloat}, {kFloat, kFloat}}},
         {part, part},
         {},
         enqueue_patch_rotation},
        {"FrameAttention", {heads}, {{{kHalf, kHalf, kHalf, kHalf}, {kHalf}}}, {first}, {}, enqueue_frame_attention},
        {"WindowAttention",
         {heads, window},
         {{{kHalf, kHalf, kFloat, kFloat}, {kHalf}}},
         {{-1, {{0, 0}, {0, 1}, {0, 2}, {0, 3, -1, 3}}}},
         {},
         enqueue_window_attention},
        {"Linear", {}, {{{kHalf, kHalf}, {kHalf}}}, {{0, {{1, 1}}}}, {}, enqueue_fp16_linear<false>},
        {"LinearGelu", {}, {{{kHalf, kHalf, kHalf}, {kHalf}}}, {{0, {{1, 1}}}}, {}, enqueue_fp16_linear<true>},
        {"PerChannelLinear",
         {},
         {{{kHalf, kInt8, kFloat}, {kHalf}}},
         {{0, {{1, 1}}}},
         {},
         enqueue_per_channel_linear,
         linear_workspace<1>},
        {"BlockwiseLinear",
         {bits},
         {{{kHalf, kUint8, kHalf}, {kHalf}}},
         {{0, {{1, 0}}}},
         {},
         enqueue_blockwise_linear<false>,
         linear_workspace<3>},
        {"BlockwiseAffineLinear",
         {bits},
         {{{kHalf, kUint8, kHalf, kUint8}, {kHalf}}},
         {{0, {{1, 0}}}},
         {},
         enqueue_blockwise_linear<true>,
         linear_workspace<3>},
        {"Int8Linear", {x_scale}, {{{kInt8, kInt8, kFloat}, {kHalf}}}, {{0, {{1, 1}}}}, {}, enqueue_per_channel_linear},
        {"QuantizeFp8", {y_scale}, {{{kHalf}, {kFp8}}}, {first}, {}, enqueue_quantize},
        {"QuantizeInt8", {y_scale}, {{{kHalf}, {kInt8}}}, {first}, {}, enqueue_quantize},
        {"Fp8Linear", {x_scale}, {{{kFp8, kFp8, kFloat}, {kHalf}}}, {{0, {{1, 0}}}}, {}, enqueue_fp8_linear<false>},
        {"Fp8LinearGelu",
         {x_scale},
         {{{kFp8, kFp8, kFloat, kHalf, kFloat}, {kFp8}}},
         {{0, {{1, 0}}}},
         {},
         enqueue_fp8_linear<true>},
        {"CachedAttention",
         {heads, kv_heads},
         {cached},
         cached_shapes,
         {{kPastKey, 1}, {kPastValue, 2}},
         enqueue_cached_attention<TANGO_ANGLES_OF_POSITIONS>},
        {"PositionedAttention",
         {heads, kv_heads},
         {cached},
         cached_shapes,
         {{kPastKey, 1}, {kPastValue, 2}},
         enqueue_cached_attention<TANGO_ANGLES_OF_TOKENS>},
        {"AttentionShares",
         {heads, kv_heads},
         {{{kHalf, kHalf, kHalf, kInt32, kHalf, kHalf}, {kFloat}}},
         {{-1, {{3, 0, 0}, {2, 1}}}},  // heads are an attribute, times the only length of `last`
         {},
         enqueue_attention_shares},
    };
}

std::vector<Operator> make_all() {
    static constexpr struct {
        const char *name, *in_fp8, *in_int8;
    } kQuantized[] = {{"BiasGelu", "BiasGeluFp8", "BiasGeluInt8"},
                      {"BiasFastGelu", "BiasFastGeluFp8", "BiasFastGeluInt8"},
                      {"SwiGLU", "SwiGLUFp8", "SwiGLUInt8"},
                      {"BiasSwiGLU", "BiasSwiGLUFp8", "BiasSwiGLUInt8"},
                      {"LayerNorm", "LayerNormFp8", "LayerNormInt8"},
                      {"RMSNorm", "RMSNormFp8", "RMSNormInt8"},
                      {"AddLayerNorm", "AddLayerNormFp8", "AddLayerNormInt8"},
                      {"AddRMSNorm", "AddRMSNormFp8", "AddRMSNormInt8"},
                      {"WideRMSNorm", "WideRMSNormFp8", "WideRMSNormInt8"},
                      {"AddWideRMSNorm", "AddWideRMSNormFp8", "AddWideRMSNormInt8"}};
    std::vector<Operator> all = make_plain();
    const size_t plain = all.size();
    for (const auto& [name, in_fp8, in_int8] : kQuantized)
        for (size_t i = 0; i < plain; ++i)
            if (std::strcmp(all[i].name, name) == 0) {
                all.push_back(quantized(in_fp8, kFp8, all[i]));
                all.push_back(quantized(in_int8, kInt8, all[i]));
            }
    return all;
}

}  // namespace

int64_t Tensor::size() const {
    int64_t size = 1;
    for (int64_t length : shape) size *= length;
    return size;
}

Lengths Operator::shape(size_t output, const std::vector<Tensor>& inputs, const std::vector<Value>& attributes) const {
    const OutputShape& wanted = outputs[output];
    Lengths shape;
    if (wanted.same_as >= 0) shape = inputs[wanted.same_as].shape;
    if (wanted.same_as >= 0 && wanted.lengths.empty()) return shape;
    if (!shape.empty()) shape.pop_back();
    for (const Length& length : wanted.lengths) {
        const Lengths& of = inputs[length.input].shape;
        if (static_cast<size_t>(length.axis) >= of.size()) return {};
        const int64_t factor = length.times_attribute < 0 ? 1 : attributes[length.times_attribute].integer;
        const int64_t divisor = length.divided_by_attribute < 0 ? 1 : attributes[length.divided_by_attribute].integer;
        shape.push_back(of[length.axis] * factor / length.divided_by / std::max<int64_t>(divisor, 1));
    }
    return shape;
}

bool Operator::is_in_place(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) const {
    return std::all_of(in_place.begin(), in_place.end(), [&](const std::pair<int, int>& shared) {
        return inputs[shared.first].data == outputs[shared.second].data;
    });
}

int Operator::run(const Call& call) const {
    if (!is_in_place(call.inputs, call.outputs))
        return fail(TANGO_BAD_ARGUMENT, "past and present must be the same memory");
    return enqueue(call);
}

const std::vector<Operator>& operators() {
    static const std::vector<Operator>& all = *new std::vector<Operator>(make_all());
    return all;
}

}  // namespace tango
