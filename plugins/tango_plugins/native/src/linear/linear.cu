// The product of many rows with a matrix of integers (tango/linear.h). Tiles of both go through a ring in shared memory;
// what a warp multiplies next it unpacks in registers, so that the weights are in memory in few bits only.
//
// A warp has two tiles of 16 or four columns of 8: 32 or 64 rows and 64 columns. The order of inputs within 32 is free, as
// long as both operands have the same.
#include <algorithm>
#include <climits>

#include "common/check.h"
#include "common/device.h"
#include "common/integers.cuh"
#include "common/platform.cuh"
#include "linear/matrix.h"

namespace tango {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kStages = 4;
constexpr int kDepth = 32;     // inputs of a stage
constexpr int kColumns = 128;  // outputs of a block: each thread brings the scale of one
constexpr int kTiles = kColumns / 2 / 8;
constexpr int kVectorBytes = 16;
constexpr int kRowBytes = kDepth * 2;  // of x in a stage
static_assert(kColumns == kThreads, "each thread brings the scale of one output");

struct Job {
    TangoLinearShape shape;
    TangoMatrix matrix;
    const __half* x;
    __half* y;
    int row_blocks;
    int shift, units;  // a block of weights has 1 << shift units of 32 inputs; units of an output, blocks filled up
};

// Brings 16 bytes, of which only some exist or the address may be odd, and fills up with zeros.
__device__ inline void bring(char* to, const char* from, int bytes) {
    if (bytes >= kVectorBytes && reinterpret_cast<uintptr_t>(from) % kVectorBytes == 0)
        return copy_async(shared_address(to), from);
    for (int i = 0; i < kVectorBytes; ++i) to[i] = i < bytes ? from[i] : 0;
}

// What a thread brings for its output in a stage, besides weights.
struct Scaling {
    uint32_t scale;  // fp16, twice
    uint32_t zero;   // as unpack_pair() takes it
};

// Weights in blocks of 4 or 8 bits. A stage has [128 outputs, 32 inputs].
template <int kBits>
struct Blocks {
    static constexpr int kUnitBytes = kDepth * kBits / 8;
    static constexpr int kBytes = kColumns * kUnitBytes;

    // Starts the copies of a thread's output for inputs [32 unit, 32 unit + 32).
    __device__ static void start(const Job& job, char* stage, int column, int unit) {
        const size_t at = static_cast<size_t>(min(column + static_cast<int>(threadIdx.x), job.shape.outputs - 1));
        const char* const from = static_cast<const char*>(job.matrix.values) + (at * job.units + unit) * kUnitBytes;
#pragma unroll
        for (int i = 0; i < kUnitBytes; i += kVectorBytes)
            copy_async(shared_address(stage) + threadIdx.x * kUnitBytes + i, from + i);
    }

    __device__ static Scaling scaling(const Job& job, int column, int unit) {
        const size_t at = static_cast<size_t>(min(column + static_cast<int>(threadIdx.x), job.shape.outputs - 1));
        const int groups = job.units >> job.shift, group = unit >> job.shift, bit = group * kBits;
        const __half scale = static_cast<const __half*>(job.matrix.scales)[at * groups + group];
        uint32_t zero = 1 << (kBits - 1);
        if (job.matrix.zeros != nullptr) {
            const uint8_t* zeros = static_cast<const uint8_t*>(job.matrix.zeros) + at * ((groups * kBits + 7) / 8);
            zero = zeros[bit / 8] >> bit % 8 & ((1 << kBits) - 1);
        }
        return {bits_of(__half2half2(scale)), (kBits == 4 ? 0xd400e400u : 0xe400e400u) +
                                                  zero * (kBits == 4 ? 0x100001u : 0x10001u)};
    }

    // Two tiles of 8 columns, as the right operands of two products each.
    __device__ static void unpack_tiles(uint32_t (&right)[2][2][2], const char* stage, const Scaling* scalings,
                                        int column) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int own = column + 8 * i + lane_id() / 4;
            const Scaling scaling = scalings[own];
            uint32_t pairs[4];
            unpack_column(pairs, stage + own * kUnitBytes, scaling.zero);
#pragma unroll
            for (int j = 0; j < 4; ++j) right[i][j / 2][j % 2] = mul2(pairs[j], scaling.scale);
        }
    }

    // Inputs 8 j + 2 t and 8 j + 2 t + 1 for a lane's t, and j from 0 to 3.
    __device__ static void unpack_column(uint32_t (&pairs)[4], const char* column, uint32_t zero) {
        const int t = lane_id() % 4;
        const uint4* const from = reinterpret_cast<const uint4*>(column);
        if constexpr (kBits == 4) {
            const uint4 words = *from;
            const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) pairs[j] = unpack_pair(word[j], t, zero);
        } else {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint4 words = from[j];
                pairs[2 * j] = unpack_pair(make_uint2(words.x, words.y), t, zero);
                pairs[2 * j + 1] = unpack_pair(make_uint2(words.z, words.w), t, zero);
            }
        }
    }

    // The first of a lane's two columns of a tile, among the 16 of two tiles, and how far apart they are.
    static constexpr int kApart = 1;
    __device__ static int first_column(int tile) { return tile * 8 + lane_id() % 4 * 2; }

    __device__ static float factor(const Job&, int) { return 1.0f; }
};

// Weights of 8 bits by rows. A stage has [32 inputs, 128 outputs].
struct Rows {
    static constexpr int kBytes = kColumns * kDepth;
    static constexpr int kVectors = kColumns / kVectorBytes;  // of a row

    __device__ static void start(const Job& job, char* stage, int column, int unit) {
        for (int i = threadIdx.x; i < kDepth * kVectors; i += kThreads) {
            const int row = i / kVectors, vector = i % kVectors, first = column + vector * kVectorBytes;
            const size_t input = static_cast<size_t>(min(unit * kDepth + row, job.shape.inputs - 1));
            const char* const from = static_cast<const char*>(job.matrix.values) + input * job.shape.outputs + first;
            bring(stage + row * kColumns + swizzled(row, vector), from, job.shape.outputs - first);
        }
    }

    __device__ static Scaling scaling(const Job&, int, int) { return {}; }

    // Bytes are read in pairs, so that one tile has the even columns of 16, and the other the odd ones.
    __device__ static void unpack_tiles(uint32_t (&right)[2][2][2], const char* stage, const Scaling*, int column) {
        const int row = lane_id();
        uint32_t words[4];
        load_transposed(words, shared_address(const_cast<char*>(stage)) + row * kColumns + swizzled(row, column / 16));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            right[0][j / 2][j % 2] = unpack_signed<0, 2>(words[j]);
            right[1][j / 2][j % 2] = unpack_signed<1, 3>(words[j]);
        }
    }

    static constexpr int kApart = 2;
    __device__ static int first_column(int tile) { return tile + lane_id() % 4 * 4; }

    __device__ static float factor(const Job& job, int column) {
        return static_cast<const float*>(job.matrix.scales)[column];
    }

  private:
    __device__ static int swizzled(int row, int vector) { return (vector ^ row % 8) * kVectorBytes; }
};

template <typename Weights, int kRows>
struct Tile {
    static constexpr int kRowTiles = kRows / 2 / 16;  // of a warp
    static constexpr int kStageBytes = kRows * kRowBytes + Weights::kBytes;
    static constexpr int kSharedBytes = kStages * kStageBytes + 2 * kColumns * static_cast<int>(sizeof(Scaling));
};

// Where 8 inputs of a row are in a stage: swizzled, so that eight rows are in all banks.
__device__ inline int x_offset(int row, int vector) {
    return row * kRowBytes + (vector ^ row / 2 % 4) * kVectorBytes;
}

template <typename Weights, int kRows>
__global__ void __launch_bounds__(kThreads, 2) linear(const Job job) {
    using T = Tile<Weights, kRows>;
    char* const stages = reinterpret_cast<char*>(shared_memory());
    Scaling* const scalings = reinterpret_cast<Scaling*>(stages + kStages * T::kStageBytes);
    const int row = blockIdx.x % job.row_blocks * kRows, column = blockIdx.x / job.row_blocks * kColumns;
    const int units = ceil_div(job.shape.inputs, kDepth);

    const auto start = [&](int unit) {
        if (unit < units) {
            char* const stage = stages + unit % kStages * T::kStageBytes;
            for (int i = threadIdx.x; i < kRows * (kRowBytes / kVectorBytes); i += kThreads) {
                const int r = i / (kRowBytes / kVectorBytes), vector = i % (kRowBytes / kVectorBytes);
                const int input = unit * kDepth + vector * 8;
                const size_t at = static_cast<size_t>(min(row + r, job.shape.rows - 1)) * job.shape.inputs + input;
                bring(stage + x_offset(r, vector), reinterpret_cast<const char*>(job.x + at),
                      (job.shape.inputs - input) * 2);
            }
            Weights::start(job, stage + kRows * kRowBytes, column, unit);
        }
        copy_commit();
    };
    for (int unit = 0; unit < kStages - 1; ++unit) start(unit);
    scalings[threadIdx.x] = Weights::scaling(job, column, 0);
    Scaling next = Weights::scaling(job, column, min(1, units - 1));

    const int warp_row = warp_id() / 2 * (kRows / 2), warp_column = warp_id() % 2 * (kColumns / 2);
    const int x_row = warp_row + lane_id() % 16, x_vector = lane_id() / 16;  // that the lane addresses
    float sum[T::kRowTiles][kTiles][4] = {};
#pragma unroll 1
    for (int unit = 0; unit < units; ++unit) {
        copy_wait<kStages - 2>();
        __syncthreads();
        scalings[(unit + 1) % 2 * kColumns + threadIdx.x] = next;
        next = Weights::scaling(job, column, min(unit + 2, units - 1));
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
            uint32_t right[2][2][2];
            Weights::unpack_tiles(right, stage + kRows * kRowBytes, scalings + unit % 2 * kColumns,
                                  warp_column + 8 * j);
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int i = 0; i < T::kRowTiles; ++i)
#pragma unroll
                    for (int k = 0; k < 2; ++k) mma(sum[i][j + n], left[i][k], right[n][k]);
        }
    }

#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
        const int first = column + warp_column + j / 2 * 16 + Weights::first_column(j % 2);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int at = first + c * Weights::kApart;
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
cudaError_t launch_rows(Job job, cudaStream_t stream) {
    job.row_blocks = ceil_div(job.shape.rows, kRows);
    const int blocks = job.row_blocks * ceil_div(job.shape.outputs, kColumns);
    return launch(linear<Weights, kRows>, job, blocks, kThreads, Tile<Weights, kRows>::kSharedBytes, stream);
}

// Larger blocks read less, smaller ones leave fewer SMs idle.
template <typename Weights>
cudaError_t launch_best(const Job& job, int sms, cudaStream_t stream) {
    constexpr int kLarge = 128, kSmall = 64, kResident = 2;
    const auto time = [&](int rows) {
        const int blocks = ceil_div(job.shape.rows, rows) * ceil_div(job.shape.outputs, kColumns);
        return ceil_div(blocks, sms * kResident) * rows;
    };
    return time(kLarge) <= time(kSmall) ? launch_rows<Weights, kLarge>(job, stream)
                                        : launch_rows<Weights, kSmall>(job, stream);
}

}  // namespace
}  // namespace tango

using namespace tango;

int tango_linear_enqueue(const TangoLinearShape* shape, const TangoMatrix* matrix, const void* x, void* y,
                         void* stream) {
    if (int status = check_pointer("shape", shape, 1)) return status;
    if (int status = check_ranges({{"rows", shape->rows, 0, 1 << 24},
                                   {"inputs", shape->inputs, 1, 1 << 20},
                                   {"outputs", shape->outputs, 1, 1 << 20}}))
        return status;
    if (int status = check_pointer("matrix", matrix, 1)) return status;
    if (shape->rows == 0) return TANGO_OK;
    if (int status = check_matrix("values", *matrix)) return status;
    if (matrix->weights == TANGO_WEIGHTS_FP16) return fail(TANGO_BAD_ARGUMENT, "weights is 0: fp16 is not taken");
    if (int status = check_pointer("x", x, 2)) return status;
    if (int status = check_pointer("y", y, 2)) return status;
    DeviceProperties gpu;
    if (int status = cuda_status(query_device(gpu), "linear")) return status;
    Job job = {*shape, *matrix, static_cast<const __half*>(x), static_cast<__half*>(y), 0, 0, 0};
    if (matrix->weights != TANGO_WEIGHTS_INT8) {
        job.shift = matrix->group >> 6;  // 32, 64, 128: 0, 1, 2
        job.units = ceil_div(shape->inputs, matrix->group) << job.shift;
    }
    const auto on = static_cast<cudaStream_t>(stream);
    const cudaError_t error = matrix->weights == TANGO_WEIGHTS_INT8       ? launch_best<Rows>(job, gpu.sms, on)
                              : matrix->weights == TANGO_WEIGHTS_BLOCKS_4 ? launch_best<Blocks<4>>(job, gpu.sms, on)
                                                                          : launch_best<Blocks<8>>(job, gpu.sms, on);
    return cuda_status(error, "linear");
}
