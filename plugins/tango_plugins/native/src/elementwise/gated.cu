// The gated activation of linear layers with biases (tango/activation.h): one pass over memory, as in activation.cu.
#include <climits>

#include "common/check.h"
#include "common/device.h"
#include "common/platform.cuh"
#include "tango/activation.h"

namespace tango {
namespace {

constexpr int kThreads = 256;

struct Job {
    const void *gate, *gate_bias, *up, *up_bias;
    void* y;
    unsigned size, width;  // elements of gate, and of a row
    float scale;
    ResultScale y_scale;  // of a quantized y
};

// A vector of each for each thread; blocks go from the end of a tensor to its beginning, as in activation.cu.
template <typename T, typename Y, int kSize>
__global__ void __launch_bounds__(kThreads) bias_swiglu(Job job) {
    using V = Vector<T, kSize>;
    const unsigned at = (gridDim.x - 1 - blockIdx.x) * kThreads + threadIdx.x;
    if (at >= job.size / kSize) return;
    const unsigned column = at % (job.width / kSize);
    const V gate = static_cast<const V*>(job.gate)[at], up = static_cast<const V*>(job.up)[at];
    const V gate_bias = static_cast<const V*>(job.gate_bias)[column],
            up_bias = static_cast<const V*>(job.up_bias)[column];
    float results[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
        const float g = static_cast<float>(gate.at[j]) + static_cast<float>(gate_bias.at[j]);
        const float u = static_cast<float>(up.at[j]) + static_cast<float>(up_bias.at[j]);
        results[j] = __fdividef(g, 1.0f + __expf(-g)) * u * job.scale;
    }
    Vector<Y, kSize> y;
    store_as(y.at, results, job.y_scale);
    static_cast<Vector<Y, kSize>*>(job.y)[at] = y;
}

template <typename T, typename Y>
cudaError_t launch_widest(const Job& job, cudaStream_t stream) {
    constexpr int kBytes = 16, kSize = kBytes / sizeof(T);
    uintptr_t bits = 0;
    for (const void* pointer : {job.gate, job.gate_bias, job.up, job.up_bias, static_cast<const void*>(job.y)})
        bits |= reinterpret_cast<uintptr_t>(pointer);
    const bool fits = bits % kBytes == 0 && job.width % kSize == 0;
    const unsigned threads = job.size / (fits ? kSize : 1);
    const int blocks = static_cast<int>((threads + kThreads - 1) / kThreads);
    return fits ? launch(bias_swiglu<T, Y, kSize>, job, blocks, kThreads, 0, stream)
                : launch(bias_swiglu<T, Y, 1>, job, blocks, kThreads, 0, stream);
}

template <typename T>
cudaError_t launch_typed(const Job& job, int32_t y_dtype, cudaStream_t stream) {
    if (y_dtype == TANGO_FP8) return launch_widest<T, Fp8>(job, stream);
    return y_dtype == TANGO_INT8 ? launch_widest<T, int8_t>(job, stream) : launch_widest<T, T>(job, stream);
}

}  // namespace
}  // namespace tango

int tango_bias_swiglu_enqueue(int32_t dtype, const void* gate, const void* gate_bias, const void* up,
                              const void* up_bias, int64_t rows, int64_t width, float scale, int32_t y_dtype,
                              float y_scale, void* y, void* opaque) {
    using namespace tango;
    if (int status = check_ranges(
            {{"dtype", dtype, TANGO_FP16, TANGO_FP32}, {"rows", rows, 0, INT_MAX}, {"width", width, 1, INT_MAX}}))
        return status;
    if (int status = check_ranges({{"rows * width", rows * width, 0, INT_MAX}})) return status;
    if (int status = check_result(dtype, y_dtype, y_scale)) return status;
    if (rows == 0) return TANGO_OK;
    const struct {
        const char* name;
        const void* pointer;
    } all[] = {{"gate", gate}, {"gate_bias", gate_bias}, {"up", up}, {"up_bias", up_bias}, {"y", y}};
    for (const auto& tensor : all)
        if (int status = check_pointer(tensor.name, tensor.pointer, 1)) return status;
    const Job job{gate,
                  gate_bias,
                  up,
                  up_bias,
                  y,
                  static_cast<unsigned>(rows * width),
                  static_cast<unsigned>(width),
                  scale,
                  result_scale(y_scale)};
    const auto stream = static_cast<cudaStream_t>(opaque);
    return cuda_status(
        dtype == TANGO_FP16 ? launch_typed<__half>(job, y_dtype, stream) : launch_typed<float>(job, y_dtype, stream),
        "gated activation");
}
