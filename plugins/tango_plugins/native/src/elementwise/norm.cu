// LayerNorm and RMSNorm after a residual addition (tango/norm.h). Memory bandwidth bounds them: a row stays in the
// registers of a warp, or of a block if it is wide, from the loads to the last store. A thread starts all of its loads
// before it computes.
#include <climits>

#include "common/check.h"
#include "common/device.h"
#include "common/platform.cuh"
#include "tango/norm.h"

namespace tango {
namespace {

constexpr int kMaxWarps = 32, kRowsPerBlock = 4;  // of a block; the latter where a warp has a row

struct Job {
    TangoNormShape shape;
    TangoNormTensors tensors;
    bool is_centered;     // LayerNorm
    ResultScale y_scale;  // of a quantized y
    int warps_per_row;    // 1, or all warps of the block
};

// How a row is divided: into groups of kSize elements, of which a thread takes up to kGroups.
template <int kSizeOfGroup, int kGroupsPerThread>
struct Division {
    static constexpr int kSize = kSizeOfGroup, kGroups = kGroupsPerThread;
    static constexpr int kWarps = ceil_div(TANGO_MAX_NORM_WIDTH, kWarp * kSize * kGroups);
    static_assert(kWarps <= kMaxWarps, "a block must hold the widest row");
};
using ByVector = Division<8, 2>;  // with more per thread an SM holds fewer threads, and is slower
using ByElement = Division<1, 8>;

// The sum of a value over the threads of a row. Each call of a block has its own `scratch`, of kMaxWarps elements.
__device__ inline float row_sum(float value, int warps, float* scratch) {
    value = warp_sum(value);
    if (warps == 1) return value;
    if (lane_id() == 0) scratch[warp_id()] = value;
    __syncthreads();
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += scratch[w];
    return sum;
}

// Elements of a bias, whose type is known to the kernel only when it runs.
template <int kSize>
__device__ inline Vector<float, kSize> load_bias(const Job& job, int at) {
    Vector<float, kSize> bias = {};
    if (job.tensors.bias == nullptr) return bias;
    if (job.shape.bias_dtype == TANGO_FP32) return static_cast<const Vector<float, kSize>*>(job.tensors.bias)[at];
    const auto half = static_cast<const Vector<__half, kSize>*>(job.tensors.bias)[at];
#pragma unroll
    for (int j = 0; j < kSize; ++j) bias.at[j] = static_cast<float>(half.at[j]);
    return bias;
}

template <typename D, typename Stream, typename Branch, typename Y>
__global__ void __launch_bounds__((D::kWarps > kRowsPerBlock ? D::kWarps : kRowsPerBlock) * kWarp) norm_rows(Job job) {
    constexpr int kSize = D::kSize, kGroups = D::kGroups;
    using Streams = Vector<Stream, kSize>;
    using Branches = Vector<Branch, kSize>;
    using Floats = Vector<float, kSize>;
    using Results = Vector<Y, kSize>;
    const TangoNormTensors& tensors = job.tensors;
    float* scratch = reinterpret_cast<float*>(shared_memory());
    const int warps = job.warps_per_row, groups = job.shape.width / kSize;
    const int row = warps == 1 ? blockIdx.x * kRowsPerBlock + warp_id() : blockIdx.x;
    if (row >= job.shape.rows) return;  // of a block with a row per warp, where no thread waits for another warp
    const int first = warps == 1 ? lane_id() : threadIdx.x, step = warps * kWarp;
    const size_t begin = static_cast<size_t>(row) * groups;

    Streams sum[kGroups];
    Branches branch[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
        if (const int at = first + i * step; at < groups)
            sum[i] = static_cast<const Streams*>(tensors.residual)[begin + at];
    if (tensors.branch != nullptr) {
#pragma unroll
        for (int i = 0; i < kGroups; ++i)
            if (const int at = first + i * step; at < groups)
                branch[i] = static_cast<const Branches*>(tensors.branch)[begin + at];
#pragma unroll
        for (int i = 0; i < kGroups; ++i)
            if (const int at = first + i * step; at < groups) {
                const Floats bias = load_bias<kSize>(job, at);
#pragma unroll
                for (int j = 0; j < kSize; ++j)
                    sum[i].at[j] = static_cast<Stream>(
                        static_cast<float>(sum[i].at[j]) +
                        fmaf(static_cast<float>(branch[i].at[j]), job.shape.branch_scale, bias.at[j]));
            }
    }
    if (tensors.sum != nullptr) {
#pragma unroll
        for (int i = 0; i < kGroups; ++i)
            if (const int at = first + i * step; at < groups) static_cast<Streams*>(tensors.sum)[begin + at] = sum[i];
    }

    float mean = 0.0f, squares = 0.0f;
    if (job.is_centered) {
#pragma unroll
        for (int i = 0; i < kGroups; ++i)
            if (first + i * step < groups)
#pragma unroll
                for (int j = 0; j < kSize; ++j) mean += static_cast<float>(sum[i].at[j]);
        mean = row_sum(mean, warps, scratch) / job.shape.width;
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
        if (first + i * step < groups)
#pragma unroll
            for (int j = 0; j < kSize; ++j) {
                const float deviation = static_cast<float>(sum[i].at[j]) - mean;
                squares += deviation * deviation;
            }
    const float scale = rsqrtf(row_sum(squares, warps, scratch + kMaxWarps) / job.shape.width + job.shape.epsilon);
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
        if (const int at = first + i * step; at < groups) {
            const Floats weight = reinterpret_cast<const Floats*>(tensors.weight)[at];
            Floats beta = {};
            if (tensors.beta != nullptr) beta = reinterpret_cast<const Floats*>(tensors.beta)[at];
            float normed[kSize];
#pragma unroll
            for (int j = 0; j < kSize; ++j)
                normed[j] = (static_cast<float>(sum[i].at[j]) - mean) * scale * weight.at[j] + beta.at[j];
            Results y;
            store_as(y.at, normed, job.y_scale);
            static_cast<Results*>(tensors.y)[begin + at] = y;
        }
}

template <typename D, typename Stream, typename Branch, typename Y>
cudaError_t launch_norm(Job job, cudaStream_t stream) {
    job.warps_per_row = ceil_div(job.shape.width / D::kSize, kWarp * D::kGroups);
    const bool is_wide = job.warps_per_row > 1;
    const int blocks = is_wide ? job.shape.rows : ceil_div(job.shape.rows, kRowsPerBlock);
    const int threads = (is_wide ? job.warps_per_row : kRowsPerBlock) * kWarp;
    const size_t shared = is_wide ? 2 * kMaxWarps * sizeof(float) : 0;
    return launch(norm_rows<D, Stream, Branch, Y>, job, blocks, threads, shared, stream);
}

// Chooses a kernel for the element types, one after the other.
template <typename D, typename... Types>
cudaError_t launch_typed(const Job& job, cudaStream_t stream) {
    const TangoNormShape& shape = job.shape;
    const int32_t dtypes[] = {shape.stream_dtype, shape.branch_dtype, shape.y_dtype};
    if constexpr (sizeof...(Types) == 3) {
        return launch_norm<D, Types...>(job, stream);
    } else {
        if constexpr (sizeof...(Types) == 2)
            if (is_quantized(shape.y_dtype))
                return shape.y_dtype == TANGO_FP8 ? launch_typed<D, Types..., Fp8>(job, stream)
                                                  : launch_typed<D, Types..., int8_t>(job, stream);
        return dtypes[sizeof...(Types)] == TANGO_FP16 ? launch_typed<D, Types..., __half>(job, stream)
                                                      : launch_typed<D, Types..., float>(job, stream);
    }
}

int check_shape(const TangoNormShape& shape, bool has_branch, bool has_bias) {
    if (int status = check_ranges({{"rows", shape.rows, 0, INT_MAX},
                                   {"width", shape.width, 1, TANGO_MAX_NORM_WIDTH},
                                   {"stream_dtype", shape.stream_dtype, TANGO_FP16, TANGO_FP32},
                                   {"y_dtype", shape.y_dtype, TANGO_FP16, TANGO_INT8}}))
        return status;
    if (int status = check_scale("y_scale", shape.y_dtype, shape.y_scale)) return status;
    if (has_branch) {
        if (int status = check_ranges({{"branch_dtype", shape.branch_dtype, TANGO_FP16, TANGO_FP32}})) return status;
        if (!(shape.branch_scale > 0.0f))
            return fail(TANGO_BAD_ARGUMENT, "branch_scale is %g: it must be above 0",
                        static_cast<double>(shape.branch_scale));
    }
    if (has_bias)
        if (int status = check_ranges({{"bias_dtype", shape.bias_dtype, TANGO_FP16, TANGO_FP32}})) return status;
    if (shape.epsilon >= 0.0f) return TANGO_OK;
    return fail(TANGO_BAD_ARGUMENT, "epsilon is %g: it must not be negative", static_cast<double>(shape.epsilon));
}

size_t element_bytes(int32_t dtype) { return is_quantized(dtype) ? 1 : dtype == TANGO_FP16 ? 2 : 4; }

// Checks the pointers, and says whether all of them are aligned to 16 bytes.
int check_tensors(const TangoNormShape& shape, const TangoNormTensors& tensors, bool& is_aligned) {
    const size_t stream = element_bytes(shape.stream_dtype), branch = element_bytes(shape.branch_dtype);
    const struct {
        const char* name;
        const void* pointer;
        size_t alignment;
        bool may_be_null;
    } all[] = {{"residual", tensors.residual, stream, false},
               {"branch", tensors.branch, branch, true},
               {"bias", tensors.bias, element_bytes(shape.bias_dtype), true},
               {"weight", tensors.weight, sizeof(float), false},
               {"beta", tensors.beta, sizeof(float), true},
               {"sum", tensors.sum, stream, true},
               {"y", tensors.y, element_bytes(shape.y_dtype), false}};
    is_aligned = true;
    for (const auto& tensor : all) {
        if (tensor.pointer == nullptr && tensor.may_be_null) continue;
        if (int status = check_pointer(tensor.name, tensor.pointer, tensor.alignment)) return status;
        is_aligned = is_aligned && reinterpret_cast<uintptr_t>(tensor.pointer) % 16 == 0;
    }
    if (tensors.bias != nullptr && tensors.branch == nullptr)
        return fail(TANGO_BAD_ARGUMENT, "bias is given without branch");
    return TANGO_OK;
}

int enqueue_norm(const TangoNormShape* shape, const TangoNormTensors* tensors, bool is_centered, void* opaque) {
    if (int status = check_pointer("shape", shape, 1)) return status;
    if (int status = check_pointer("tensors", tensors, 1)) return status;
    if (int status = check_shape(*shape, tensors->branch != nullptr, tensors->bias != nullptr)) return status;
    if (shape->rows == 0) return TANGO_OK;
    bool is_aligned;
    if (int status = check_tensors(*shape, *tensors, is_aligned)) return status;
    const Job job{*shape, *tensors, is_centered, result_scale(shape->y_scale), 0};
    const auto stream = static_cast<cudaStream_t>(opaque);
    const cudaError_t error = is_aligned && shape->width % ByVector::kSize == 0 ? launch_typed<ByVector>(job, stream)
                                                                                : launch_typed<ByElement>(job, stream);
    return cuda_status(error, "norm");
}

}  // namespace
}  // namespace tango

int tango_layer_norm_enqueue(const TangoNormShape* shape, const TangoNormTensors* tensors, void* stream) {
    return tango::enqueue_norm(shape, tensors, true, stream);
}

int tango_rms_norm_enqueue(const TangoNormShape* shape, const TangoNormTensors* tensors, void* stream) {
    return tango::enqueue_norm(shape, tensors, false, stream);
}
