// What the last token of a pass attends to (tango/attention.h). A block has a head, and a warp a key at a time: scores
// and then weights are written where the result is, which fits the L2 cache.
#include "attention/pass.cuh"
#include "common/device.h"

namespace tango {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarp;
constexpr int kKeysAtOnce = 4;  // loads of a warp that are on their way together

struct Job {
    Pass pass;
    float* shares;
};

// Over a block. Each call has its own `scratch`, of kWarps elements.
template <typename Reduce>
__device__ inline float reduce_block(float value, Reduce reduce, float* scratch) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        value = reduce(value, __shfl_xor_sync(kAllLanes, value, offset));
    if (lane_id() == 0) scratch[warp_id()] = value;
    __syncthreads();
    value = scratch[0];
    for (int w = 1; w < kWarps; ++w) value = reduce(value, scratch[w]);
    return value;
}

// The last token's query of a head, rotated and scaled.
__device__ inline void load_query(const Pass& pass, int head, float* query) {
    const int half = pass.shape.head_dim / 2, token = pass.shape.tokens - 1, column = head * pass.shape.head_dim;
    const __half* row = static_cast<const __half*>(pass.tensors.qkv) + static_cast<size_t>(token) * pass.columns();
    const __half* bias = static_cast<const __half*>(pass.tensors.bias);
    const size_t angle = static_cast<size_t>(pass.angle_row(token)) * half;
    const float scale = rsqrtf(static_cast<float>(pass.shape.head_dim));
    for (int i = threadIdx.x; i < half; i += kThreads) {
        const int low = column + i, high = low + half;
        const float a = __half2float(row[low]) + __half2float(bias[low]);
        const float b = __half2float(row[high]) + __half2float(bias[high]);
        const float cosine = __half2float(static_cast<const __half*>(pass.tensors.cosines)[angle + i]);
        const float sine = __half2float(static_cast<const __half*>(pass.tensors.sines)[angle + i]);
        query[i] = (a * cosine - b * sine) * scale;
        query[half + i] = (b * cosine + a * sine) * scale;
    }
}

__global__ void __launch_bounds__(kThreads) attention_shares(Job job) {
    const Pass& pass = job.pass;
    const int head = blockIdx.x, width = pass.shape.head_dim, capacity = pass.shape.capacity;
    const int keys = pass.last_position() + 1;
    float *query = reinterpret_cast<float*>(shared_memory()), *scratch = query + TANGO_MAX_HEAD_DIM;
    float* shares = job.shares + static_cast<size_t>(head) * capacity;
    const __half* cache = static_cast<const __half*>(pass.tensors.keys) +
                          static_cast<size_t>(head / pass.group_size()) * capacity * width;
    load_query(pass, head, query);
    __syncthreads();

    float largest = -INFINITY;
    for (int first = warp_id() * kKeysAtOnce; first < keys; first += kWarps * kKeysAtOnce) {
        float scores[kKeysAtOnce] = {};
#pragma unroll
        for (int k = 0; k < kKeysAtOnce; ++k) {
            const __half* key = cache + static_cast<size_t>(min(first + k, keys - 1)) * width;
            for (int d = 2 * lane_id(); d < width; d += 2 * kWarp) {
                const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(key + d));
                scores[k] += pair.x * query[d] + pair.y * query[d + 1];
            }
        }
#pragma unroll
        for (int k = 0; k < kKeysAtOnce; ++k) {
            const float score = warp_sum(scores[k]);
            largest = fmaxf(largest, score);  // that of the last key twice does no harm
            if (lane_id() == 0 && first + k < keys) shares[first + k] = score;
        }
    }
    largest = reduce_block(largest, [](float a, float b) { return fmaxf(a, b); }, scratch);

    float sum = 0.0f;
    for (int key = threadIdx.x; key < keys; key += kThreads) {
        shares[key] = __expf(shares[key] - largest);
        sum += shares[key];
    }
    sum = reduce_block(sum, [](float a, float b) { return a + b; }, scratch + kWarps);
    for (int key = threadIdx.x; key < capacity; key += kThreads) shares[key] = key < keys ? shares[key] / sum : 0.0f;
}

int check_tensors(const TangoAttentionTensors& tensors, const float* shares) {
    const struct {
        const char* name;
        const void* pointer;
        size_t alignment;
    } all[] = {{"qkv", tensors.qkv, 2},          {"bias", tensors.bias, 2},   {"last", tensors.last, sizeof(int32_t)},
               {"cosines", tensors.cosines, 2},  {"sines", tensors.sines, 2}, {"keys", tensors.keys, 4},
               {"shares", shares, sizeof(float)}};
    for (const auto& tensor : all)
        if (int status = check_pointer(tensor.name, tensor.pointer, tensor.alignment)) return status;
    return TANGO_OK;
}

}  // namespace
}  // namespace tango

int tango_attention_shares_enqueue(const TangoAttentionShape* shape, const TangoAttentionTensors* tensors,
                                   float* shares, void* stream) {
    using namespace tango;
    if (int status = check_pointer("shape", shape, 1)) return status;
    if (int status = check_pointer("tensors", tensors, 1)) return status;
    if (int status = check_shape(*shape)) return status;
    if (int status = check_tensors(*tensors, shares)) return status;
    const Job job{{*shape, *tensors}, shares};
    const size_t shared = (TANGO_MAX_HEAD_DIM + 2 * kWarps) * sizeof(float);
    return cuda_status(launch(attention_shares, job, shape->heads, kThreads, shared, static_cast<cudaStream_t>(stream)),
                       "attention shares");
}
