// Biases and activations (tango/activation.h). Memory bandwidth bounds them, so a thread starts all of its loads before
// it computes. Blocks go from the end of a tensor to its beginning: what the preceding matmul wrote last is still in
// the L2 cache, and what is written last here will be there for the next matmul.
#include <climits>

#include "common/check.h"
#include "common/device.h"
#include "common/platform.cuh"
#include "tango/activation.h"

namespace tango {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 2;

struct Add {
    __device__ float operator()(float x, float bias) const { return x + bias; }
};

// The exact GELU is u less |u| times the normal distribution's tail at |u|, or for negative u just less that product.
// The tail is t 2^(P(t) - u^2 log2(e) / 2) with t = 1 / (1 + 0.22 |u|) and a polynomial P, fitted in fp64 for the least
// relative error: 2.6e-7. So small values are as exact as large ones, for a third of what normcdff() takes.
struct GeluErf {
    __device__ float operator()(float x, float bias) const {
        constexpr float kHalfLog2E = 0.5f * 1.4426950408889634f;
        const float u = x + bias, size = fabsf(u), a = fminf(size, 16.0f);  // beyond, the tail is 0 in fp32
        const float t = __fdividef(1.0f, fmaf(0.22f, a, 1.0f));
        float p = 0.60793823f;
        p = fmaf(p, t, -2.34702250f);
        p = fmaf(p, t, 3.17310003f);
        p = fmaf(p, t, -2.12951061f);
        p = fmaf(p, t, 1.33136374f);
        p = fmaf(p, t, 0.398314389f);
        p = fmaf(p, t, 1.47806757f);
        p = fmaf(p, t, -3.51225048f);
        const float tail = t * exp2_fast(fmaf(-kHalfLog2E * a, a, p));
        return fmaf(-a, tail, 0.5f * (u + size));
    }
};

// GELU's tanh is a sigmoid: 0.5 (1 + tanh(z)) = 1 / (1 + exp(-2 z)).
struct GeluTanh {
    __device__ float operator()(float x, float bias) const {
        constexpr float kTwice = 2.0f * 0.7978845608f;  // 2 sqrt(2 / pi)
        const float u = x + bias;
        return __fdividef(u, 1.0f + __expf(-kTwice * u * fmaf(0.044715f * u, u, 1.0f)));
    }
};

struct Identity {
    __device__ float operator()(float x, float) const { return x; }
};

struct SwiGLU {
    __device__ float operator()(float gate, float up) const { return __fdividef(gate, 1.0f + __expf(-gate)) * up; }
};

struct Job {
    const void *a, *b;  // b may be null, which stands for zeros
    void* y;
    unsigned size, period;  // elements of a, and of b
    ResultScale y_scale;    // of a quantized y
};

// y[i] = function(a[i], b[i % period]), a vector at a time.
template <typename T, typename Y, int kSize, typename Function>
__global__ void __launch_bounds__(kThreads) map(Job job) {
    using V = Vector<T, kSize>;
    const V *a = static_cast<const V*>(job.a), *b = static_cast<const V*>(job.b);
    const unsigned size = job.size / kSize, period = job.period / kSize;
    const unsigned begin = (gridDim.x - 1 - blockIdx.x) * kThreads * kVectorsPerThread + threadIdx.x;
    V left[kVectorsPerThread], right[kVectorsPerThread];
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; ++i) {
        const unsigned at = begin + i * kThreads;
        if (at >= size) break;
        left[i] = a[at];
        right[i] = b == nullptr ? V{} : b[period < size ? at % period : at];
    }
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; ++i) {
        const unsigned at = begin + i * kThreads;
        if (at >= size) break;
        float results[kSize];
#pragma unroll
        for (int j = 0; j < kSize; ++j)
            results[j] = Function()(static_cast<float>(left[i].at[j]), static_cast<float>(right[i].at[j]));
        Vector<Y, kSize> y;
        store_as(y.at, results, job.y_scale);
        static_cast<Vector<Y, kSize>*>(job.y)[at] = y;
    }
}

template <typename T, typename Y, int kSize, typename Function>
cudaError_t launch_map(const Job& job, cudaStream_t stream) {
    constexpr unsigned kVectorsPerBlock = kThreads * kVectorsPerThread;
    const unsigned blocks = (job.size / kSize + kVectorsPerBlock - 1) / kVectorsPerBlock;
    return launch(map<T, Y, kSize, Function>, job, static_cast<int>(blocks), kThreads, 0, stream);
}

template <typename T, typename Y, typename Function>
cudaError_t launch_widest(const Job& job, cudaStream_t stream) {
    constexpr int kBytes = 16, kSize = kBytes / sizeof(Y);  // stores of 16 bytes, whatever the loads are
    const auto bits =
        reinterpret_cast<uintptr_t>(job.a) | reinterpret_cast<uintptr_t>(job.b) | reinterpret_cast<uintptr_t>(job.y);
    const bool fits = bits % kBytes == 0 && job.period % kSize == 0;
    return fits ? launch_map<T, Y, kSize, Function>(job, stream) : launch_map<T, Y, 1, Function>(job, stream);
}

template <typename T, typename Function>
cudaError_t launch_typed(const Job& job, int32_t y_dtype, cudaStream_t stream) {
    if (y_dtype == TANGO_FP8) return launch_widest<T, Fp8, Function>(job, stream);
    return y_dtype == TANGO_INT8 ? launch_widest<T, int8_t, Function>(job, stream)
                                 : launch_widest<T, T, Function>(job, stream);
}

struct Argument {
    const char* name;
    const void* pointer;
    bool may_be_null = false;
};

struct Result {
    int32_t dtype;  // that of the inputs, FP8 or INT8
    float scale;    // of the latter two
    void* y;
};

template <typename Function>
int enqueue(int32_t dtype, Argument a, Argument b, int64_t size, int64_t period, const Result& result, void* opaque) {
    if (int status = check_ranges({{"dtype", dtype, TANGO_FP16, TANGO_FP32}})) return status;
    if (int status = check_result(dtype, result.dtype, result.scale)) return status;
    if (size == 0) return TANGO_OK;
    for (const Argument& argument : {a, b, Argument{"y", result.y}}) {
        if (argument.may_be_null) continue;
        if (int status = check_pointer(argument.name, argument.pointer, 1)) return status;
    }
    const Job job{a.pointer,
                  b.pointer,
                  result.y,
                  static_cast<unsigned>(size),
                  static_cast<unsigned>(period),
                  result_scale(result.scale)};
    const auto stream = static_cast<cudaStream_t>(opaque);
    const cudaError_t error = dtype == TANGO_FP16 ? launch_typed<__half, Function>(job, result.dtype, stream)
                                                  : launch_typed<float, Function>(job, result.dtype, stream);
    return cuda_status(error, "activation");
}

template <typename Function>
int enqueue_rows(int32_t dtype, const void* x, Argument bias, int64_t rows, int64_t width, const Result& result,
                 void* stream) {
    if (int status = check_ranges({{"rows", rows, 0, INT_MAX}, {"width", width, 1, INT_MAX}})) return status;
    if (int status = check_ranges({{"rows * width", rows * width, 0, INT_MAX}})) return status;
    return enqueue<Function>(dtype, {"x", x}, bias, rows * width, width, result, stream);
}

}  // namespace
}  // namespace tango

int tango_bias_enqueue(int32_t dtype, const void* x, const void* bias, int64_t rows, int64_t width, void* y,
                       void* stream) {
    return tango::enqueue_rows<tango::Add>(dtype, x, {"bias", bias}, rows, width, {dtype, 1.0f, y}, stream);
}

int tango_bias_gelu_enqueue(int32_t dtype, int32_t gelu, const void* x, const void* bias, int64_t rows, int64_t width,
                            int32_t y_dtype, float y_scale, void* y, void* stream) {
    if (int status = tango::check_ranges({{"gelu", gelu, TANGO_GELU_ERF, TANGO_GELU_TANH}})) return status;
    const tango::Argument optional_bias{"bias", bias, true};
    const auto enqueue =
        gelu == TANGO_GELU_ERF ? tango::enqueue_rows<tango::GeluErf> : tango::enqueue_rows<tango::GeluTanh>;
    return enqueue(dtype, x, optional_bias, rows, width, {y_dtype, y_scale, y}, stream);
}

int tango_swiglu_enqueue(int32_t dtype, const void* gate, const void* up, int64_t size, int32_t y_dtype, float y_scale,
                         void* y, void* stream) {
    if (int status = tango::check_ranges({{"size", size, 0, INT_MAX}})) return status;
    return tango::enqueue<tango::SwiGLU>(dtype, {"gate", gate}, {"up", up}, size, size, {y_dtype, y_scale, y}, stream);
}

int tango_quantize_enqueue(int32_t dtype, const void* x, int64_t size, int32_t y_dtype, float y_scale, void* y,
                           void* stream) {
    if (int status = tango::check_ranges({{"size", size, 0, INT_MAX}, {"y_dtype", y_dtype, TANGO_FP8, TANGO_INT8}}))
        return status;
    return tango::enqueue<tango::Identity>(dtype, {"x", x}, {"", nullptr, true}, size, size, {y_dtype, y_scale, y},
                                           stream);
}
