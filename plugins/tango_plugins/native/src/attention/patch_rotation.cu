// Rotation of a tower's queries and keys (tango/patch_rotation.h): a thread has eight dimensions of a head and their
// partners half a head later. Memory bandwidth bounds it.
#include <climits>

#include "attention/flash.cuh"
#include "common/check.h"
#include "common/device.h"
#include "tango/patch_rotation.h"

namespace tango {
namespace {

constexpr int kThreads = 256;

struct Job {
    TangoPatchRotationShape shape;
    TangoPatchRotationTensors tensors;
    int parts;  // that are written: query and key, and value where `rotated` is
};

struct alignas(16) Float8 {
    float at[Half8::kSize];
};

// Eight columns of a row with their bias.
__device__ inline Float8 load_biased(const Job& job, size_t row, int column) {
    const int columns = 3 * job.shape.heads * job.shape.head_dim;
    const Half8 vector = load(job.tensors.qkv, row * columns + column), bias = load(job.tensors.bias, column);
    Float8 sum;
#pragma unroll
    for (int i = 0; i < Half8::kSize / 2; ++i) {
        const float2 a = __half22float2(vector.at[i]), b = __half22float2(bias.at[i]);
        sum.at[2 * i] = a.x + b.x, sum.at[2 * i + 1] = a.y + b.y;
    }
    return sum;
}

__device__ inline void write(const Job& job, size_t row, int part, int column, const Float8& values) {
    const int width = job.shape.heads * job.shape.head_dim;
    if (job.tensors.rotated == nullptr) {
        float* to = part == 0 ? job.tensors.query : job.tensors.key;
        *reinterpret_cast<Float8*>(to + row * width + column) = values;
        return;
    }
    Half8 narrow;
#pragma unroll
    for (int i = 0; i < Half8::kSize / 2; ++i) narrow.at[i] = __floats2half2_rn(values.at[2 * i], values.at[2 * i + 1]);
    store(job.tensors.rotated, row * 3 * width + part * width + column, narrow);
}

__global__ void __launch_bounds__(kThreads) rotate_patches(Job job) {
    const TangoPatchRotationShape& shape = job.shape;
    const int half = shape.head_dim / 2, pieces = half / Half8::kSize, units = job.parts * shape.heads * pieces;
    const int index = blockIdx.x * kThreads + threadIdx.x, row = index / units, unit = index % units;
    if (row >= shape.frames * shape.tokens) return;
    const int part = unit / (shape.heads * pieces), head = unit / pieces % shape.heads;
    const int d = unit % pieces * Half8::kSize, column = head * shape.head_dim + d;
    const int from = part * shape.heads * shape.head_dim + column;
    Float8 low = load_biased(job, row, from), high = load_biased(job, row, from + half);
    if (part < 2) {
        const size_t angle = static_cast<size_t>(row % shape.tokens) * half + d;
        const Float8 cosines = *reinterpret_cast<const Float8*>(job.tensors.cosines + angle);
        const Float8 sines = *reinterpret_cast<const Float8*>(job.tensors.sines + angle);
#pragma unroll
        for (int i = 0; i < Half8::kSize; ++i) {
            const float a = low.at[i], b = high.at[i];
            low.at[i] = a * cosines.at[i] - b * sines.at[i];
            high.at[i] = b * cosines.at[i] + a * sines.at[i];
        }
    }
    write(job, row, part, column, low);
    write(job, row, part, column + half, high);
}

int check_tensors(const TangoPatchRotationTensors& tensors) {
    const struct {
        const char* name;
        const void* pointer;
        bool is_used;
    } all[] = {{"qkv", tensors.qkv, true},
               {"bias", tensors.bias, true},
               {"cosines", tensors.cosines, true},
               {"sines", tensors.sines, true},
               {"rotated", tensors.rotated, tensors.rotated != nullptr},
               {"query", tensors.query, tensors.rotated == nullptr},
               {"key", tensors.key, tensors.rotated == nullptr}};
    for (const auto& tensor : all) {
        if (!tensor.is_used) continue;
        if (int status = check_pointer(tensor.name, tensor.pointer, 16)) return status;
    }
    return TANGO_OK;
}

int check_shape(const TangoPatchRotationShape& shape) {
    if (int status = check_ranges({{"frames", shape.frames, 1, INT_MAX},
                                   {"tokens", shape.tokens, 1, INT_MAX},
                                   {"heads", shape.heads, 1, 1 << 10},
                                   {"head_dim", shape.head_dim, 16, 1 << 10},
                                   {"head_dim % 16", shape.head_dim % 16, 0, 0}}))
        return status;
    const long long rows = 1LL * shape.frames * shape.tokens;
    if (int status = check_ranges({{"frames * tokens", rows, 1, INT_MAX / kThreads}})) return status;
    return check_ranges({{"frames * tokens * heads * head_dim / 16 * 3",
                          rows * (3LL * shape.heads * (shape.head_dim / 16)), 1, INT_MAX - kThreads}});
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
    const Job job{*shape, *tensors, tensors->rotated != nullptr ? 3 : 2};
    const int threads = shape->frames * shape->tokens * (job.parts * shape->heads * (shape->head_dim / 16));
    return cuda_status(
        launch(rotate_patches, job, ceil_div(threads, kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)),
        "rotation of patches");
}
