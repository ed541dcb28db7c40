// Rotation of a tower's queries and keys (tango/patch_rotation.h): a thread has eight dimensions of a patch's queries
// or keys and their partners half a head later, in several heads, which have the same angles. Memory bandwidth bounds
// it.
#include <climits>

#include "attention/flash.cuh"
#include "attention/rotation.cuh"
#include "common/check.h"
#include "common/device.h"
#include "tango/patch_rotation.h"

namespace tango {
namespace {

constexpr int kThreads = 256, kHeads = 4;  // of a thread, at most

struct Job {
    TangoPatchRotationShape shape;
    TangoPatchRotationTensors tensors;

    __host__ __device__ int strides() const {
        return ceil_div(shape.heads, kHeads);
    }  // from one of its heads to the next
    __host__ __device__ int pieces() const { return shape.head_dim / 2 / Half8::kSize; }
    __host__ __device__ int units() const { return 2 * strides() * pieces(); }  // of a patch
};

struct alignas(16) Float8 {
    float at[Half8::kSize];
};

__device__ inline Float8 widen(const Half8& vector, const Half8& bias) {
    Float8 sum;
#pragma unroll
    for (int i = 0; i < Half8::kSize / 2; ++i) {
        const float2 a = __half22float2(vector.at[i]), b = __half22float2(bias.at[i]);
        sum.at[2 * i] = a.x + b.x, sum.at[2 * i + 1] = a.y + b.y;
    }
    return sum;
}

__device__ inline void write(float* to, const Float8& values) { *reinterpret_cast<Float8*>(to) = values; }

__device__ inline void write(__half* to, const Float8& values) {
    Half8 narrow;
#pragma unroll
    for (int i = 0; i < Half8::kSize / 2; ++i) narrow.at[i] = __floats2half2_rn(values.at[2 * i], values.at[2 * i + 1]);
    store(to, narrow);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) rotate_patches(Job job) {
    const TangoPatchRotationShape& shape = job.shape;
    const TangoPatchRotationTensors& tensors = job.tensors;
    const int half = shape.head_dim / 2, width = shape.heads * shape.head_dim, strides = job.strides();
    const int index = blockIdx.x * kThreads + threadIdx.x, row = index / job.units(), unit = index % job.units();
    if (row >= shape.frames * shape.tokens) return;
    const int part = unit / (strides * job.pieces()), d = unit % job.pieces() * Half8::kSize;
    const int first = unit / job.pieces() % strides * shape.head_dim + d, step = strides * shape.head_dim;
    Half8 lows[kHeads], highs[kHeads];
#pragma unroll
    for (int i = 0; i < kHeads; ++i)
        if (const int column = first + i * step; column < width) {
            const size_t from = static_cast<size_t>(row) * 3 * width + part * width + column;
            lows[i] = load(tensors.qkv, from), highs[i] = load(tensors.qkv, from + half);
        }
    const size_t angle = static_cast<size_t>(row % shape.tokens) * half + d;
    const Float8 cosines = *reinterpret_cast<const Float8*>(tensors.cosines + angle);
    const Float8 sines = *reinterpret_cast<const Float8*>(tensors.sines + angle);
    T* const to = static_cast<T*>(part == 0 ? tensors.query : tensors.key) + static_cast<size_t>(row) * width;
#pragma unroll
    for (int i = 0; i < kHeads; ++i)
        if (const int column = first + i * step; column < width) {
            const int biased = part * width + column;
            Float8 low = widen(lows[i], load(tensors.bias, biased));
            Float8 high = widen(highs[i], load(tensors.bias, biased + half));
#pragma unroll
            for (int j = 0; j < Half8::kSize; ++j) rotate_pair(low.at[j], high.at[j], cosines.at[j], sines.at[j]);
            write(to + column, low);
            write(to + column + half, high);
        }
}

int check_tensors(const TangoPatchRotationTensors& tensors) {
    const struct {
        const char* name;
        const void* pointer;
    } all[] = {{"qkv", tensors.qkv},     {"bias", tensors.bias},   {"cosines", tensors.cosines},
               {"sines", tensors.sines}, {"query", tensors.query}, {"key", tensors.key}};
    for (const auto& tensor : all)
        if (int status = check_pointer(tensor.name, tensor.pointer, 16)) return status;
    return TANGO_OK;
}

int check_shape(const TangoPatchRotationShape& shape) {
    if (int status = check_ranges({{"frames", shape.frames, 1, INT_MAX},
                                   {"tokens", shape.tokens, 1, INT_MAX},
                                   {"heads", shape.heads, 1, 1 << 10},
                                   {"head_dim", shape.head_dim, 16, 1 << 10},
                                   {"head_dim % 16", shape.head_dim % 16, 0, 0},
                                   {"dtype", shape.dtype, TANGO_FP16, TANGO_FP32}}))
        return status;
    const long long rows = 1LL * shape.frames * shape.tokens;
    if (int status = check_ranges({{"frames * tokens", rows, 1, INT_MAX / kThreads}})) return status;
    return check_ranges({{"frames * tokens * heads * head_dim / 16 * 2",
                          rows * (2LL * shape.heads * (shape.head_dim / 16)), 1, INT_MAX - kThreads}});
}

}  // namespace
}  // namespace tango

int tango_patch_rotation_enqueue(const TangoPatchRotationShape* shape, const TangoPatchRotationTensors* tensors,
                                 void* stream) {
    using namespace tango;
    if (int status = check_pointer("shape", shape, 1)) return status;
    if (int status = check_pointer("tensors", tensors, 1)) return status;
    if (int status = check_shape(*shape)) return status;
    if (int status = check_tensors(*tensors)) return status;
    const Job job{*shape, *tensors};
    const int blocks = ceil_div(shape->frames * shape->tokens * job.units(), kThreads);
    const auto kernel = shape->dtype == TANGO_FP16 ? rotate_patches<__half> : rotate_patches<float>;
    return cuda_status(launch(kernel, job, blocks, kThreads, 0, static_cast<cudaStream_t>(stream)),
                       "rotation of patches");
}
