// The product of many rows with a matrix of integers (tango/linear.h), on the tensor cores of any architecture. Tiles
// of both operands go through a ring in shared memory; what a warp multiplies next it unpacks in registers, so that the
// weights are in memory in few bits only.
//
// A warp has 32 or 64 rows and 64 columns. The order of inputs within 32 is free, as long as both operands have the
// same.
#include "common/check.h"
#include "common/device.h"
#include "linear/product.h"
#include "linear/slabs.h"
#include "linear/weights.cuh"

namespace tango {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kStages = 4;
constexpr int kTiles = kColumns / 2 / 8;
static_assert(kRowBytes == kUnit * 2);
static_assert(kColumns == kThreads, "each thread brings an output's weights");

template <typename Weights, int kRows>
struct Tile {
    static constexpr int kRowTiles = kRows / 2 / 16;  // of a warp
    static constexpr int kStageBytes = kRows * kRowBytes + Weights::kBytes;
    static constexpr int kSharedBytes = kStages * kStageBytes + 2 * kColumns * static_cast<int>(sizeof(Scaling));
};

template <typename Weights, int kRows>
__global__ void __launch_bounds__(kThreads, 2) linear(const LinearJob job) {
    using T = Tile<Weights, kRows>;
    char* const stages = reinterpret_cast<char*>(shared_memory());
    Scaling* const scalings = reinterpret_cast<Scaling*>(stages + kStages * T::kStageBytes);
    const int row = blockIdx.x % job.row_blocks * kRows, column = blockIdx.x / job.row_blocks * kColumns;
    const int units = ceil_div(job.shape.inputs, kUnit);

    const auto start = [&](int unit) {
        if (unit < units) {
            char* const stage = stages + unit % kStages * T::kStageBytes;
            bring_rows<kRows, kThreads>(stage, job.x, row, job.shape.rows, unit * kRowBytes, job.shape.inputs * 2);
            Weights::start(job, stage + kRows * kRowBytes, column, threadIdx.x, unit);
        }
        copy_commit();
    };
    for (int unit = 0; unit < kStages - 1; ++unit) start(unit);
    scalings[threadIdx.x] = Weights::scaling(job, column, threadIdx.x, 0);
    Scaling next = Weights::scaling(job, column, threadIdx.x, min(1, units - 1));

    const int warp_row = warp_id() / 2 * (kRows / 2), warp_column = warp_id() % 2 * (kColumns / 2);
    const int x_row = warp_row + lane_id() % 16, x_vector = lane_id() / 16;  // that the lane addresses
    float sum[T::kRowTiles][kTiles][4] = {};
#pragma unroll 1
    for (int unit = 0; unit < units; ++unit) {
        copy_wait<kStages - 2>();
        __syncthreads();
        scalings[(unit + 1) % 2 * kColumns + threadIdx.x] = next;
        next = Weights::scaling(job, column, threadIdx.x, min(unit + 2, units - 1));
        start(unit + kStages - 1);
        char* const stage = stages + unit % kStages * T::kStageBytes;
        uint32_t left[T::kRowTiles][2][4];
#pragma unroll
        for (int i = 0; i < T::kRowTiles; ++i)
#pragma unroll
            for (int k = 0; k < 2; ++k)
                load_matrices(left[i][k], shared_address(stage) + x_offset(x_row + 16 * i, 2 * k + x_vector));
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
            uint32_t pairs[2][4];
            Weights::unpack_two(pairs, stage + kRows * kRowBytes, scalings + unit % 2 * kColumns, warp_column + 8 * j);
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int i = 0; i < T::kRowTiles; ++i)
#pragma unroll
                    for (int k = 0; k < 2; ++k) mma(sum[i][j + n], left[i][k], {pairs[n][2 * k], pairs[n][2 * k + 1]});
        }
    }

#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int own = lane_id() % 4 * 2 + c;  // of a tile's columns
            const int at =
                column + warp_column + j / 2 * 16 + (Weights::kNeighbors ? 2 * own + j % 2 : 8 * (j % 2) + own);
            if (at >= job.shape.outputs) continue;
            const float factor = Weights::factor(job, at);
#pragma unroll
            for (int i = 0; i < T::kRowTiles; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int r = row + warp_row + 16 * i + 8 * half + lane_id() / 4;
                    if (r < job.shape.rows)
                        job.y[static_cast<size_t>(r) * job.shape.outputs + at] =
                            __float2half(sum[i][j][2 * half + c] * factor);
                }
        }
    }
}

template <typename Weights, int kRows>
cudaError_t launch_rows(LinearJob job, cudaStream_t stream) {
    job.row_blocks = ceil_div(job.shape.rows, kRows);
    const int blocks = job.row_blocks * ceil_div(job.shape.outputs, kColumns);
    return launch(linear<Weights, kRows>, job, blocks, kThreads, Tile<Weights, kRows>::kSharedBytes, stream);
}

template <typename Weights>
cudaError_t launch_best(const LinearJob& job, int sms, cudaStream_t stream) {
    return prefers_large(job.shape, sms) ? launch_rows<Weights, kLargeRows>(job, stream)
                                         : launch_rows<Weights, kSmallRows>(job, stream);
}

int check_shape(const TangoLinearShape* shape) {
    if (int status = check_pointer("shape", shape, 1)) return status;
    return check_ranges({{"rows", shape->rows, 0, 1 << 24},
                         {"inputs", shape->inputs, 1, 1 << 20},
                         {"outputs", shape->outputs, 1, 1 << 20}});
}

}  // namespace
}  // namespace tango

using namespace tango;

int tango_linear_workspace(const TangoLinearShape* shape, size_t* bytes) {
    if (int status = check_shape(shape)) return status;
    if (int status = check_pointer("bytes", bytes, alignof(size_t))) return status;
    DeviceProperties gpu;
    if (int status = cuda_status(query_device(gpu), "linear")) return status;
    *bytes = has_cublaslt() ? slab_bytes(*shape, gpu.major) : 0;
    return TANGO_OK;
}

int tango_linear_enqueue(const TangoLinearShape* shape, const TangoMatrix* matrix, const void* x, void* y,
                         void* workspace, size_t workspace_bytes, void* stream) {
    if (int status = check_shape(shape)) return status;
    if (int status = check_pointer("matrix", matrix, 1)) return status;
    if (shape->rows == 0) return TANGO_OK;
    if (int status = check_matrix("values", *matrix)) return status;
    if (matrix->weights == TANGO_WEIGHTS_FP16 || matrix->weights == TANGO_WEIGHTS_FP8)
        return fail(TANGO_BAD_ARGUMENT, "weights is %d: fp16 and FP8 are not taken", matrix->weights);
    if (int status = check_pointer("x", x, 2)) return status;
    if (int status = check_pointer("y", y, 2)) return status;
    LinearJob job = {*shape, *matrix, static_cast<const __half*>(x), static_cast<__half*>(y), 0, {}, 0};
    if (matrix->weights != TANGO_WEIGHTS_INT8) {
        job.shift = matrix->group >> 6;  // 32, 64, 128: 0, 1, 2
        job.places = places_of(*matrix, shape->inputs, shape->outputs);
    }
    const auto on = static_cast<cudaStream_t>(stream);
    if (workspace != nullptr) {
        if (int status = check_pointer("workspace", workspace, kVectorBytes)) return status;
        return multiply_slabs(job, workspace, workspace_bytes, on);
    }
    DeviceProperties gpu;
    if (int status = cuda_status(query_device(gpu), "linear")) return status;
    const cudaError_t error = matrix->weights == TANGO_WEIGHTS_INT8       ? launch_best<Rows>(job, gpu.sms, on)
                              : matrix->weights == TANGO_WEIGHTS_BLOCKS_4 ? launch_best<Blocks<4>>(job, gpu.sms, on)
                                                                          : launch_best<Blocks<8>>(job, gpu.sms, on);
    return cuda_status(error, "linear");
}
