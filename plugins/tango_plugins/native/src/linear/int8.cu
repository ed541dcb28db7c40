// The product of INT8 rows with an INT8 matrix (tango/linear.h), on the tensor cores of any architecture. Tiles of both
// operands go through a ring in shared memory.
//
// The matrix is stored by inputs, [inputs, outputs], and a tensor core takes four inputs of one output as a register.
// ldmatrix transposes pairs of bytes, two neighboring outputs of an input. So two transposed matrices hold four inputs
// of two outputs in a lane, and a byte permutation for each output puts them into a register. Which inputs those are,
// the addresses of the matrices' rows decide: 4 t to 4 t + 3 for the lane's t, as in the rows of x, which ldmatrix
// reads as they are.
#include "common/check.h"
#include "common/device.h"
#include "linear/matrix.h"
#include "linear/tile.cuh"

namespace tango {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kStages = 3;                 // 48 KB with the larger tile: two blocks fit into the 100 KB of sm_86's SM
constexpr int kDepth = kRowBytes;          // inputs of a stage
constexpr int kStep = 32;                  // inputs of an instruction
constexpr int kPairs = kColumns / 2 / 16;  // of a warp's columns: 16 at a time, the even and the odd ones
constexpr int kColumnVectors = kColumns / kVectorBytes;
constexpr int kGroup = 8;  // row blocks that go through the columns together

struct Job {
    TangoLinearShape shape;
    const void *x, *weight;
    const float* scales;
    float x_scale;
    __half* y;
    bool is_aligned;  // rows of both operands are whole vectors at aligned addresses
    int row_blocks, column_blocks;
};

// Where 16 outputs of an input are in a stage. The eight inputs that ldmatrix reads at a time are 0, 1, 4, 5, 8, 9, 12
// and 13 after a multiple of 16, or 2 more; swizzled, they are in all banks.
__device__ inline int weight_offset(int input, int vector) {
    return input * kColumns + (vector ^ ((input / 2 & 6) | (input & 1))) * kVectorBytes;
}

__device__ inline void bring_weights(const Job& job, char* stage, int begin, int column) {
    for (int i = threadIdx.x; i < kDepth * kColumnVectors; i += kThreads) {
        const int input = i / kColumnVectors, vector = i % kColumnVectors, first = column + vector * kVectorBytes;
        // Inputs after the last one are zero in x, so they may be anything here.
        const size_t at = static_cast<size_t>(min(begin + input, job.shape.inputs - 1)) * job.shape.outputs + first;
        bring(stage + weight_offset(input, vector), static_cast<const char*>(job.weight) + at,
              job.shape.outputs - first);
    }
}

// The vectors that a thread brings of every stage, where both operands are aligned.
template <int kRows>
class Copies {
  public:
    __device__ Copies(const Job& job, int row, int column) {
        const int r = threadIdx.x / kRowVectors, vector = threadIdx.x % kRowVectors;
        begin_ = vector * kVectorBytes, x_to_ = x_offset(r, vector);
#pragma unroll
        for (int i = 0; i < kRows / kXRows; ++i) {
            const size_t at = min(row + r + i * kXRows, job.shape.rows - 1);
            x_[i] = static_cast<const char*>(job.x) + at * job.shape.inputs + begin_;
        }
        const int input = threadIdx.x / kColumnVectors, own = threadIdx.x % kColumnVectors;
        const int first = column + own * kVectorBytes;
        has_column_ = first < job.shape.outputs, weight_to_ = weight_offset(input, own);
        weight_ = static_cast<const char*>(job.weight) + static_cast<size_t>(input) * job.shape.outputs + first;
    }

    // Starts the copies of the next stage, whose first input is `begin`. Where x has no inputs any more it is zero, so
    // that weights may be anything there, as they may be in columns that nobody stores.
    __device__ void start(const Job& job, char* rows, char* weights, int begin) {
        const bool has_input = begin + begin_ < job.shape.inputs;
#pragma unroll
        for (int i = 0; i < kRows / kXRows; ++i, rows += kXRows * kRowBytes) {
            if (has_input) {
                copy_async(shared_address(rows) + x_to_, x_[i]);
            } else {
                *reinterpret_cast<uint4*>(rows + x_to_) = uint4{};
            }
            x_[i] += kDepth;
        }
        const size_t step = static_cast<size_t>(kWeightInputs) * job.shape.outputs;
#pragma unroll
        for (int i = 0; i < kDepth; i += kWeightInputs, weights += kWeightInputs * kColumns, weight_ += step)
            if (has_column_ && begin + i < job.shape.inputs) copy_async(shared_address(weights) + weight_to_, weight_);
    }

  private:
    static constexpr int kXRows = kThreads / kRowVectors;            // rows that the threads bring together
    static constexpr int kWeightInputs = kThreads / kColumnVectors;  // and inputs of the matrix
    static_assert(kWeightInputs == kVectorBytes, "all of them are there, or none");

    const char *x_[kRows / kXRows], *weight_;
    int begin_, x_to_, weight_to_;
    bool has_column_;
};

// 16 columns of a stage's matrix and 32 inputs as right operands: the even columns, and the odd ones. A lane gives the
// address of its row.
__device__ inline void load_weights(uint32_t (&even)[2], uint32_t (&odd)[2], SharedAddress address) {
    uint32_t words[4];
    load_transposed(words, address);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        even[half] = __byte_perm(words[2 * half], words[2 * half + 1], 0x6420);
        odd[half] = __byte_perm(words[2 * half], words[2 * half + 1], 0x7531);
    }
}

// Stores what a lane has of a row: four neighboring outputs.
__device__ inline void store_four(const Job& job, int row, int column, const int (&sums)[4],
                                  const float (&factors)[4]) {
    __half* const to = job.y + static_cast<size_t>(row) * job.shape.outputs + column;
    Vector<__half, 4> results;
#pragma unroll
    for (int i = 0; i < 4; ++i) results.at[i] = __float2half(static_cast<float>(sums[i]) * factors[i]);
    if (column + 4 <= job.shape.outputs && reinterpret_cast<uintptr_t>(to) % sizeof(results) == 0) {
        *reinterpret_cast<Vector<__half, 4>*>(to) = results;
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (column + i < job.shape.outputs) to[i] = results.at[i];
    }
}

// A warp has half of the block's rows and columns.
template <int kRows>
__global__ void __launch_bounds__(kThreads, 2) int8_linear(const Job job) {
    constexpr int kRowTiles = kRows / 2 / 16;
    constexpr int kRowsBytes = kRows * kRowBytes, kStageBytes = kRowsBytes + kDepth * kColumns;
    char* const stages = reinterpret_cast<char*>(shared_memory());
    // Blocks that run at the same time share rows and columns, which then are in a small L2 cache, too.
    const int in_group = kGroup * job.column_blocks, first = blockIdx.x / in_group * kGroup;
    const int rows_of_group = min(kGroup, job.row_blocks - first), place = blockIdx.x % in_group;
    const int row = (first + place % rows_of_group) * kRows, column = place / rows_of_group * kColumns;
    const int units = ceil_div(job.shape.inputs, kDepth);

    Copies<kRows> copies(job, row, column);
    const auto start = [&](int unit) {
        char *const rows = stages + unit % kStages * kStageBytes, *const weights = rows + kRowsBytes;
        if (unit < units && job.is_aligned) {
            copies.start(job, rows, weights, unit * kDepth);
        } else if (unit < units) {
            bring_rows<kRows, kThreads>(rows, job.x, row, job.shape.rows, unit * kDepth, job.shape.inputs);
            bring_weights(job, weights, unit * kDepth, column);
        }
        copy_commit();
    };
    for (int unit = 0; unit < kStages - 1; ++unit) start(unit);

    const int warp_row = warp_id() / 2 * (kRows / 2), warp_column = warp_id() % 2 * (kColumns / 2);
    // What the lane addresses of a stage: of x for each step, of the matrix for each 16 columns.
    int x_at[kDepth / kStep], weight_at[kPairs];
#pragma unroll
    for (int step = 0; step < kDepth / kStep; ++step)
        x_at[step] = x_offset(warp_row + lane_id() % 16, 2 * step + lane_id() / 16);
    const int input = lane_id() / 16 * 16 + lane_id() % 8 / 2 * 4 + lane_id() / 8 % 2 * 2 + lane_id() % 2;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) weight_at[j] = kRowsBytes + weight_offset(input, warp_column / 16 + j);
    int sum[kRowTiles][kPairs][2][4] = {};
#pragma unroll 1
    for (int unit = 0; unit < units; ++unit) {
        copy_wait<kStages - 2>();
        __syncthreads();
        start(unit + kStages - 1);
        const SharedAddress stage = shared_address(stages + unit % kStages * kStageBytes);
#pragma unroll
        for (int step = 0; step < kDepth / kStep; ++step) {
            uint32_t left[kRowTiles][4];
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) load_matrices(left[i], stage + x_at[step] + 16 * i * kRowBytes);
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                uint32_t even[2], odd[2];
                load_weights(even, odd, stage + weight_at[j] + step * kStep * kColumns);
#pragma unroll
                for (int i = 0; i < kRowTiles; ++i) {
                    mma(sum[i][j][0], left[i], even);
                    mma(sum[i][j][1], left[i], odd);
                }
            }
        }
    }

#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
        const int at = column + warp_column + 16 * j + lane_id() % 4 * 4;
        float factors[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) factors[i] = job.x_scale * job.scales[min(at + i, job.shape.outputs - 1)];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int r = row + warp_row + 16 * i + 8 * half + lane_id() / 4;
                const auto& [even, odd] = sum[i][j];
                if (r < job.shape.rows)
                    store_four(job, r, at, {even[2 * half], odd[2 * half], even[2 * half + 1], odd[2 * half + 1]},
                               factors);
            }
    }
}

template <int kRows>
cudaError_t launch_rows(Job job, cudaStream_t stream) {
    job.row_blocks = ceil_div(job.shape.rows, kRows), job.column_blocks = ceil_div(job.shape.outputs, kColumns);
    constexpr size_t kSharedBytes = kStages * (kRows * kRowBytes + kDepth * kColumns);
    return launch(int8_linear<kRows>, job, job.row_blocks * job.column_blocks, kThreads, kSharedBytes, stream);
}

}  // namespace
}  // namespace tango

using namespace tango;

int tango_int8_linear_enqueue(const TangoLinearShape* shape, const TangoMatrix* matrix, const void* x, float x_scale,
                              void* y, void* stream) {
    if (int status = check_pointer("shape", shape, 1)) return status;
    if (int status = check_ranges({{"rows", shape->rows, 0, 1 << 24},
                                   {"inputs", shape->inputs, 1, TANGO_MAX_INT8_INPUTS},
                                   {"outputs", shape->outputs, 1, 1 << 20}}))
        return status;
    if (int status = check_pointer("matrix", matrix, 1)) return status;
    if (int status = check_scale("x_scale", TANGO_INT8, x_scale)) return status;
    if (shape->rows == 0) return TANGO_OK;
    if (int status = check_matrix("values", *matrix)) return status;
    if (matrix->weights != TANGO_WEIGHTS_INT8)
        return fail(TANGO_BAD_ARGUMENT, "weights is %d: INT8 activations need %d", matrix->weights, TANGO_WEIGHTS_INT8);
    if (int status = check_pointer("x", x, 1)) return status;
    if (int status = check_pointer("y", y, 2)) return status;
    DeviceProperties gpu;
    if (int status = cuda_status(query_device(gpu), "int8 linear")) return status;
    const auto bits = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(matrix->values);
    Job job = {};
    job.shape = *shape, job.x = x, job.weight = matrix->values, job.y = static_cast<__half*>(y);
    job.scales = static_cast<const float*>(matrix->scales), job.x_scale = x_scale;
    job.is_aligned = (bits | shape->inputs | shape->outputs) % kVectorBytes == 0;
    const auto on = static_cast<cudaStream_t>(stream);
    const cudaError_t error =
        prefers_large(*shape, gpu.sms) ? launch_rows<kLargeRows>(job, on) : launch_rows<kSmallRows>(job, on);
    return cuda_status(error, "int8 linear");
}
