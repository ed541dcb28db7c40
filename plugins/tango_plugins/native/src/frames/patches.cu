// Normalized patches of frames (tango/patches.h): a block has a row of a frame's pixels, which is a row of each patch
// that it crosses.
#include <climits>
#include <cstdint>

#include "common/check.h"
#include "common/device.h"
#include "common/platform.cuh"
#include "tango/patches.h"

namespace tango {
namespace {

constexpr int kThreads = 256, kChannels = 3;

struct Job {
    TangoPatchesShape shape;
    TangoPatchesTensors tensors;
};

__global__ void __launch_bounds__(kThreads) cut_patches(Job job) {
    const auto [frames, steps, rows, columns, size] = job.shape;
    const int row = blockIdx.x % rows, step = blockIdx.x / rows % steps, frame = blockIdx.x / rows / steps;
    const int values = columns * kChannels, width = size * kChannels, across = columns / size;
    const auto* const from = static_cast<const uint8_t*>(job.tensors.pixels) + static_cast<size_t>(blockIdx.x) * values;
    // The row of the first patch; that of the next one is a patch further.
    const size_t patch = static_cast<size_t>(steps) * size * width;
    const size_t first = (static_cast<size_t>(frame) * (rows / size) + row / size) * across * patch;
    __half* const to = static_cast<__half*>(job.tensors.patches) + first + (step * size + row % size) * width;
    for (int i = threadIdx.x; i < values; i += kThreads) {
        const int channel = i % kChannels;
        const float unit = static_cast<float>(from[i]) / 255.0f;
        const float normalized = (unit - job.tensors.mean[channel]) / job.tensors.deviation[channel];
        to[i / width * patch + i % width] = __float2half_rn(normalized);
    }
}

int check_shape(const TangoPatchesShape& shape) {
    constexpr int kLongest = 1 << 16;
    if (int status = check_ranges({{"frames", shape.frames, 0, kLongest},
                                   {"steps", shape.steps, 1, kLongest},
                                   {"rows", shape.rows, 1, kLongest},
                                   {"columns", shape.columns, 1, kLongest},
                                   {"size", shape.size, 1, kLongest}}))
        return status;
    if (int status = check_multiple("rows", shape.rows, shape.size)) return status;
    if (int status = check_multiple("columns", shape.columns, shape.size)) return status;
    const long long blocks = 1LL * shape.frames * shape.steps * shape.rows;  // at most 2^48
    if (int status = check_ranges({{"frames * steps * rows", blocks, 0, INT_MAX}})) return status;
    return check_ranges({{"3 * steps * size * size", 3LL * shape.steps * shape.size * shape.size, 1, INT_MAX}});
}

int check_tensors(const TangoPatchesTensors& tensors) {
    if (int status = check_pointer("pixels", tensors.pixels, 1)) return status;
    if (int status = check_pointer("mean", tensors.mean, sizeof(float))) return status;
    if (int status = check_pointer("deviation", tensors.deviation, sizeof(float))) return status;
    return check_pointer("patches", tensors.patches, sizeof(__half));
}

}  // namespace
}  // namespace tango

int tango_patches_enqueue(const TangoPatchesShape* shape, const TangoPatchesTensors* tensors, void* stream) {
    using namespace tango;
    if (int status = check_pointer("shape", shape, 1)) return status;
    if (int status = check_pointer("tensors", tensors, 1)) return status;
    if (int status = check_shape(*shape)) return status;
    if (shape->frames == 0) return TANGO_OK;
    if (int status = check_tensors(*tensors)) return status;
    const int blocks = shape->frames * shape->steps * shape->rows;
    return cuda_status(
        launch(cut_patches, Job{*shape, *tensors}, blocks, kThreads, 0, static_cast<cudaStream_t>(stream)), "patches");
}
