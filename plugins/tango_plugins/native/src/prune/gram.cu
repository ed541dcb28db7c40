// Inner products of rotated rows, on the tensor cores of any architecture. gram_sm90.cu has Hopper's own kernels.
//
// A block computes tiles of 128 x 128 and gathers their rows through the context list. Operands are fp16, accumulators
// fp32. The exact form splits each operand into a high and a low fp16, and adds the three products that matter. It adds
// them in short runs, because tensor cores truncate: one accumulation over all of D would lose the last digits.
// The inner product of equal rows has the same bits in whichever tile it is computed, so their distance is 0.
#include "common/device.h"
#include "gram.cuh"

namespace tango {
namespace {

template <bool kExact>
struct Shape {
    static constexpr int kWarpsM = 2, kWarpsN = kExact ? 4 : 2;
    static constexpr int kThreads = kWarpsM * kWarpsN * kWarp;
    static constexpr int kBlocksPerSm = kExact ? 1 : 2;
    static constexpr int kRowsM = kTile / kWarpsM / 16;     // fragments of 16 rows per warp
    static constexpr int kColumnsN = kTile / kWarpsN / 16;  // fragments of 16 columns per warp
    static constexpr int kK = 32;                           // step along D
    static constexpr int kPlanes = kExact ? 2 : 1;
    static constexpr int kWords = kK / 8;  // words of 16 bytes per row and step
    static constexpr int kRowsPerPass = kThreads / kWords;
    static constexpr int kPasses = kTile / kRowsPerPass;
    static constexpr int kOperandBytes = kTile * kK * 2;
    static constexpr int kStageBytes = 2 * kPlanes * kOperandBytes;
    static constexpr int kStages = 3;
    static constexpr int kBytes = kStages * kStageBytes;  // the exact form does not fit into sm_75's
    static constexpr int kRunSteps = 1;                   // exact: steps accumulated before they are added to the total
};

template <typename S>
__device__ void load_step(const Job& job, uint32_t stage, const uint32_t (&row)[S::kPasses],
                          const uint32_t (&column)[S::kPasses], int step) {
#pragma unroll
    for (int plane = 0; plane < S::kPlanes; ++plane) {
        const __half* rotated = plane ? job.rotated_low : job.rotated_high;
        const uint32_t to = stage + plane * 2 * S::kOperandBytes;
        load_rows<S::kWords, S::kPasses, S::kRowsPerPass>(rotated, to, row, step);
        load_rows<S::kWords, S::kPasses, S::kRowsPerPass>(rotated, to + S::kOperandBytes, column, step);
    }
}

// Loads fragments of 16 rows, or columns, for one tensor core instruction.
template <typename S, int kCount, bool kColumns>
__device__ void load_fragments(uint32_t (&fragments)[kCount][4], uint32_t operand, int first, int k) {
    const int lane = lane_id();
    const int row = lane % 8 + (kColumns ? lane / 16 : lane / 8 % 2) * 8;
    const int word = 2 * k + (kColumns ? lane / 8 % 2 : lane / 16);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        load_matrices(fragments[i], operand + swizzled<S::kWords>(first + 16 * i + row, word));
}

template <typename S>
__device__ void multiply(float (&acc)[S::kRowsM][2 * S::kColumnsN][4], const uint32_t (&a)[S::kRowsM][4],
                         const uint32_t (&b)[S::kColumnsN][4]) {
#pragma unroll
    for (int m = 0; m < S::kRowsM; ++m)
#pragma unroll
        for (int n = 0; n < 2 * S::kColumnsN; ++n) mma(acc[m][n], a[m], {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]});
}

// acc += a low_b + low_a b. Each instruction takes both products of the same 8 columns of D. So swapping the operands
// changes no bit on a tensor core that adds its 16 products at once.
template <typename S>
__device__ void multiply_crosswise(float (&acc)[S::kRowsM][2 * S::kColumnsN][4], const uint32_t (&a)[S::kRowsM][4],
                                   const uint32_t (&low_a)[S::kRowsM][4], const uint32_t (&b)[S::kColumnsN][4],
                                   const uint32_t (&low_b)[S::kColumnsN][4]) {
#pragma unroll
    for (int m = 0; m < S::kRowsM; ++m)
#pragma unroll
        for (int n = 0; n < 2 * S::kColumnsN; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = n % 2 * 2 + half;
                mma(acc[m][n], {a[m][2 * half], a[m][2 * half + 1], low_a[m][2 * half], low_a[m][2 * half + 1]},
                    {low_b[n / 2][i], b[n / 2][i]});
            }
}

template <Pairs kPairs, bool kExact>
__global__ void __launch_bounds__(Shape<kExact>::kThreads, Shape<kExact>::kBlocksPerSm) gram_tiles(Job job, int strip) {
    using S = Shape<kExact>;
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ int before[kPairs == Pairs::kSymmetric ? kMaxPackedRows : 1];
    const TileList<kPairs, kTile> tiles(job, strip, before);
    const uint32_t base = shared_address(shared);
    const int warp_row = warp_id() / S::kWarpsN * (kTile / S::kWarpsM);
    const int warp_column = warp_id() % S::kWarpsN * (kTile / S::kWarpsN);
    const int steps = job.padded_D / S::kK, words_per_row = job.padded_D / 8;

    for (int index = blockIdx.x; index < tiles.count; index += gridDim.x) {
        Tile tile;
        if (!tiles.find(index, tile)) continue;
        uint32_t row[S::kPasses], column[S::kPasses];  // offsets of this thread's words
#pragma unroll
        for (int pass = 0; pass < S::kPasses; ++pass) {
            const int r = threadIdx.x / S::kWords + pass * S::kRowsPerPass, word = threadIdx.x % S::kWords;
            row[pass] = tiles.row_token(tile, r) * words_per_row + word;
            column[pass] = tiles.column_token(tile, r) * words_per_row + word;
        }

        float acc[S::kRowsM][2 * S::kColumnsN][4] = {}, partial_acc[S::kRowsM][2 * S::kColumnsN][4] = {};
        for (int stage = 0; stage < S::kStages - 1; ++stage) {
            if (stage < steps) load_step<S>(job, base + stage * S::kStageBytes, row, column, stage);
            copy_commit();
        }
        for (int step = 0; step < steps; ++step) {
            copy_wait<S::kStages - 2>();
            __syncthreads();
            const int ahead = step + S::kStages - 1;
            if (ahead < steps) load_step<S>(job, base + ahead % S::kStages * S::kStageBytes, row, column, ahead);
            copy_commit();
            const uint32_t stage = base + step % S::kStages * S::kStageBytes;
#pragma unroll
            for (int k = 0; k < S::kK / 16; ++k) {
                uint32_t a[S::kRowsM][4], b[S::kColumnsN][4];
                load_fragments<S, S::kRowsM, false>(a, stage, warp_row, k);
                load_fragments<S, S::kColumnsN, true>(b, stage + S::kOperandBytes, warp_column, k);
                if (kExact) {
                    uint32_t low_b[S::kColumnsN][4], low_a[S::kRowsM][4];
                    load_fragments<S, S::kColumnsN, true>(low_b, stage + 3 * S::kOperandBytes, warp_column, k);
                    load_fragments<S, S::kRowsM, false>(low_a, stage + 2 * S::kOperandBytes, warp_row, k);
                    multiply_crosswise<S>(partial_acc, a, low_a, b, low_b);
                    multiply<S>(partial_acc, a, b);
                } else {
                    multiply<S>(acc, a, b);
                }
            }
            if (kExact && (step % S::kRunSteps == S::kRunSteps - 1 || step == steps - 1)) {
#pragma unroll
                for (int m = 0; m < S::kRowsM; ++m)
#pragma unroll
                    for (int n = 0; n < 2 * S::kColumnsN; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            acc[m][n][i] += partial_acc[m][n][i];
                            partial_acc[m][n][i] = 0.0f;
                        }
            }
        }
        copy_wait<0>();
        __syncthreads();  // the next tile overwrites the stages
#pragma unroll
        for (int m = 0; m < S::kRowsM; ++m)
#pragma unroll
            for (int n = 0; n < 2 * S::kColumnsN; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    tiles.store(tile, warp_row + 16 * m + 8 * half + lane_id() / 4,
                                warp_column + 8 * n + lane_id() % 4 * 2, acc[m][n][2 * half], acc[m][n][2 * half + 1]);
    }
}

template <Pairs kPairs, bool kExact>
cudaError_t launch(const Job& job, int strip, int sms, cudaStream_t stream) {
    using S = Shape<kExact>;
    const auto kernel = gram_tiles<kPairs, kExact>;
    const cudaError_t raised = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
    if (raised != cudaSuccess) return raised;
    kernel<<<sms * S::kBlocksPerSm, S::kThreads, S::kBytes, stream>>>(job, strip);
    return cudaGetLastError();
}

template <Pairs kPairs>
cudaError_t launch(const Job& job, int strip, int sms, cudaStream_t stream) {
    return job.exact_products ? launch<kPairs, true>(job, strip, sms, stream)
                              : launch<kPairs, false>(job, strip, sms, stream);
}

}  // namespace

cudaError_t gram(const Job& job, Pairs pairs, int strip, cudaStream_t stream) {
    DeviceProperties gpu;
    const cudaError_t error = query_device(gpu);
    if (error != cudaSuccess) return error;
#ifdef TANGO_SM90A
    if (gpu.major == 9) return gram_sm90(job, pairs, strip, gpu.sms, stream);
#endif
    switch (pairs) {
        case Pairs::kSymmetric: return launch<Pairs::kSymmetric>(job, strip, gpu.sms, stream);
        case Pairs::kStrip: return launch<Pairs::kStrip>(job, strip, gpu.sms, stream);
        case Pairs::kDiagonal: return launch<Pairs::kDiagonal>(job, strip, gpu.sms, stream);
        default: return launch<Pairs::kAnchors>(job, strip, gpu.sms, stream);
    }
}

}  // namespace tango
