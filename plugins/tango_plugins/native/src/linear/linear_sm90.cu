// The product of many rows with a matrix of integers by Hopper's warpgroup instructions. They exist on sm_90a only, so
// this file is compiled for nothing else.
//
// The product is computed transposed: weights are the left operand, which may be in registers, where they are unpacked;
// rows of x are the right one, in shared memory. Two warpgroups have 64 outputs each. While the tensor cores work on 32
// inputs, the same threads unpack the next, and copies of later ones are under way.
#include <algorithm>

#include "linear/weights.cuh"
#ifndef TANGO_PLATFORM_HEADER
#include "common/wgmma.cuh"
#endif

namespace tango {
namespace {

constexpr int kThreads = 256;
constexpr int kStages = 4, kAhead = kStages - 2;    // steps between a copy and its product
constexpr int kUnits = 2, kDepth = kUnits * kUnit;  // of a step
constexpr int kWords = kDepth * 2 / kVectorBytes;   // of a row of x in a step
constexpr int kAlignment = 1024;                    // of what wgmma reads
static_assert(kThreads == kUnits * kColumns, "each thread brings the weights of an output in a unit");

template <typename Weights, int kRows>
struct Tile {
    static constexpr int kRowsBytes = kRows * kDepth * 2;
    static constexpr int kStageBytes = kRowsBytes + kUnits * Weights::kBytes;
    static constexpr int kScalingsBytes = 2 * kThreads * static_cast<int>(sizeof(Scaling));
    static constexpr int kBytes = kStages * kStageBytes + kScalingsBytes + kAlignment;
    static_assert(kStageBytes % kAlignment == 0 && kRows % 8 == 0, "a stage is aligned");
};

template <typename Weights, int kRows>
__global__ void __launch_bounds__(kThreads, 1) linear_tiles_sm90(const LinearJob job) {
    using T = Tile<Weights, kRows>;
    char* const unaligned = reinterpret_cast<char*>(shared_memory());
    char* const stages = unaligned + (kAlignment - reinterpret_cast<uintptr_t>(unaligned) % kAlignment) % kAlignment;
    Scaling* const scalings = reinterpret_cast<Scaling*>(stages + kStages * T::kStageBytes);
    const int row = blockIdx.x % job.row_blocks * kRows, column = blockIdx.x / job.row_blocks * kColumns;
    const int units = ceil_div(job.shape.inputs, kUnit), steps = ceil_div(units, kUnits);
    const int own = threadIdx.x % kColumns, own_unit = threadIdx.x / kColumns;

    const auto start = [&](int step) {
        if (step < steps) {
            char* const stage = stages + step % kStages * T::kStageBytes;
            for (int i = threadIdx.x; i < kRows * kWords; i += kThreads) {
                const int r = i / kWords, word = i % kWords, input = step * kDepth + word * 8;
                const size_t at = static_cast<size_t>(min(row + r, job.shape.rows - 1)) * job.shape.inputs + input;
                bring(stage + (r * kWords + (word ^ r % 8)) * kVectorBytes, reinterpret_cast<const char*>(job.x + at),
                      (job.shape.inputs - input) * 2);
            }
            Weights::start(job, stage + T::kRowsBytes + own_unit * Weights::kBytes, column, own,
                           min(step * kUnits + own_unit, units - 1));
        }
        copy_commit();
    };
    const auto scaling = [&](int step) {
        return Weights::scaling(job, column, own, min(step * kUnits + own_unit, units - 1));
    };
#pragma unroll
    for (int step = 0; step < kAhead; ++step) start(step);
    scalings[threadIdx.x] = scaling(0);
    Scaling next = scaling(1);

    // A unit's weights, as the left operands of two products.
    const auto unpack = [&](uint32_t (&left)[2][4], int step, int unit) {
        const char* const weights = stages + step % kStages * T::kStageBytes + T::kRowsBytes + unit * Weights::kBytes;
        uint32_t pairs[2][4];
        Weights::template unpack_two<true>(pairs, weights, scalings + step % 2 * kThreads + unit * kColumns,
                                           warp_id() * 16);
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) left[k][i] = pairs[i % 2][2 * k + i / 2];
    };
    // Waits for a step, and for all threads to have done with the one before.
    const auto enter = [&](int step) {
        copy_wait<kAhead - 1>();
        wgmma_publish();
        __syncthreads();
        scalings[(step + 1) % 2 * kThreads + threadIdx.x] = next;
        next = scaling(step + 2);
        start(step + kAhead);
    };

    float sum[kRows / 2] = {};
    uint32_t left[kUnits][2][4];
    enter(0);
    unpack(left[0], 0, 0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        const SharedAddress x = shared_address(stages + step % kStages * T::kStageBytes);
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < 2; ++k) wgmma(sum, left[unit][k], wgmma_operand<kWords>(x + 64 * unit + 32 * k), 1);
            wgmma_commit();
            if (unit + 1 < kUnits) {
                unpack(left[unit + 1], step, unit + 1);
            } else if (step + 1 < steps) {
                enter(step + 1);
                unpack(left[0], step + 1, 0);
            }
            wgmma_wait<0>();
            wgmma_hold(left[unit]);
        }
    }
    wgmma_hold(sum);
    copy_wait<0>();

    const int outputs = job.shape.outputs, first = column + warp_id() * 16 + lane_id() / 4 * 2;
    if (first >= outputs) return;
    const bool both = first + 1 < outputs,
               aligned = both && outputs % 2 == 0 && reinterpret_cast<uintptr_t>(job.y) % 4 == 0;
    const float even = Weights::factor(job, first), odd = both ? Weights::factor(job, first + 1) : 0.0f;
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int r = row + 8 * j + lane_id() % 4 * 2 + i;
            if (r >= job.shape.rows) continue;
            __half* const to = job.y + static_cast<size_t>(r) * outputs + first;
            const __half2 pair = __floats2half2_rn(sum[4 * j + i] * even, sum[4 * j + 2 + i] * odd);
            if (aligned) {
                *reinterpret_cast<__half2*>(to) = pair;
            } else {
                to[0] = pair.x;
                if (both) to[1] = pair.y;
            }
        }
}

template <typename Weights, int kRows>
cudaError_t launch_rows(LinearJob job, cudaStream_t stream) {
    job.row_blocks = ceil_div(job.shape.rows, kRows);
    const int blocks = job.row_blocks * ceil_div(job.shape.outputs, kColumns);
    return launch(linear_tiles_sm90<Weights, kRows>, job, blocks, kThreads, Tile<Weights, kRows>::kBytes, stream);
}

// The tile that leaves the fewest SMs idle, and the fewest of its rows empty.
template <typename Weights>
cudaError_t launch_best(const LinearJob& job, int sms, cudaStream_t stream) {
    constexpr int kLarge = 224, kSmall = 168;
    const auto time = [&](int rows) {
        return ceil_div(ceil_div(job.shape.rows, rows) * ceil_div(job.shape.outputs, kColumns), sms) * rows;
    };
    return time(kLarge) < time(kSmall) ? launch_rows<Weights, kLarge>(job, stream)
                                       : launch_rows<Weights, kSmall>(job, stream);
}

}  // namespace

cudaError_t linear_sm90(const LinearJob& job, int sms, cudaStream_t stream) {
    if (job.matrix.weights == TANGO_WEIGHTS_INT8) return launch_best<Rows>(job, sms, stream);
    if (job.matrix.weights == TANGO_WEIGHTS_BLOCKS_4) return launch_best<Blocks<4>>(job, sms, stream);
    return launch_best<Blocks<8>>(job, sms, stream);
}

}  // namespace tango
