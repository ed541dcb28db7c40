// Inner products of rotated rows by Hopper's warpgroup instructions. They exist on sm_90a only, so this file is
// compiled for nothing else.
//
// As gram.cu, with tiles of 128 x 256 (fast) or 128 x 192 (exact). L2 bandwidth bounds the kernel, and a wider tile
// uses each row more often. Two warpgroups have 64 rows each. While the tensor cores work on one step along D, the same
// threads start the copies for a later step.
#include "gram.cuh"

#include "common/wgmma.cuh"

namespace tango {
namespace {

constexpr int kThreads = 256;
constexpr int kRunSteps = 1;  // exact: steps along D that are accumulated before they are added to the total

// Sizes for a tile of 128 rows and kColumns columns.
template <bool kExact, int kColumns>
struct Shape {
    static constexpr int kK = kExact ? 32 : 64;  // step along D
    static constexpr int kPlanes = kExact ? 2 : 1;
    static constexpr int kStages = kExact ? 5 : 4;
    static constexpr int kAhead = kStages - 2;  // steps between a copy and its product
    static constexpr int kWords = kK / 8;
    static constexpr int kRowsPerPass = kThreads / kWords;
    static constexpr int kRowPasses = kTile / kRowsPerPass, kColumnPasses = kColumns / kRowsPerPass;
    static constexpr int kRowBytes = kTile * kK * 2, kColumnBytes = kColumns * kK * 2;
    static constexpr int kPlaneBytes = kRowBytes + kColumnBytes;
    static constexpr int kStageBytes = kPlanes * kPlaneBytes;
    static constexpr int kAccumulators = kColumns / 2;  // per thread
};

constexpr int kFastColumns = 256, kExactColumns = 192;

template <typename S>
__device__ void load_step(const Job& job, uint32_t stage, const uint32_t (&row)[S::kRowPasses],
                          const uint32_t (&column)[S::kColumnPasses], int step) {
#pragma unroll
    for (int plane = 0; plane < S::kPlanes; ++plane) {
        const __half* rotated = plane ? job.rotated_low : job.rotated_high;
        const uint32_t to = stage + plane * S::kPlaneBytes;
        load_rows<S::kWords, S::kRowPasses, S::kRowsPerPass>(rotated, to, row, step);
        load_rows<S::kWords, S::kColumnPasses, S::kRowsPerPass>(rotated, to + S::kRowBytes, column, step);
    }
}

// acc (+)= the products of one step of one plane of the rows with one of the columns.
template <typename S>
__device__ void multiply(float (&acc)[S::kAccumulators], uint32_t rows, uint32_t columns, int accumulate) {
#pragma unroll
    for (int k = 0; k < S::kK / 16; ++k)
        wgmma(acc, wgmma_operand<S::kWords>(rows + 32 * k), wgmma_operand<S::kWords>(columns + 32 * k), accumulate | k);
}

// Computes one tile with the whole block.
template <bool kExact, int kColumns, typename Tiles>
__device__ void work(const Job& job, const Tiles& tiles, const Tile& tile, uint32_t base) {
    using S = Shape<kExact, kColumns>;
    const int group_row = threadIdx.x / 128 * 64;
    const int steps = job.padded_D / S::kK, words_per_row = job.padded_D / 8;
    uint32_t row[S::kRowPasses], column[S::kColumnPasses];  // offsets of this thread's words
    const int first = threadIdx.x / S::kWords, word = threadIdx.x % S::kWords;
#pragma unroll
    for (int pass = 0; pass < S::kRowPasses; ++pass)
        row[pass] = tiles.row_token(tile, first + pass * S::kRowsPerPass) * words_per_row + word;
#pragma unroll
    for (int pass = 0; pass < S::kColumnPasses; ++pass)
        column[pass] = tiles.column_token(tile, first + pass * S::kRowsPerPass) * words_per_row + word;

    float acc[S::kAccumulators], partial_acc[kExact ? S::kAccumulators : 1];
    if (kExact)
#pragma unroll
        for (int i = 0; i < S::kAccumulators; ++i) acc[i] = 0.0f;
#pragma unroll
    for (int step = 0; step < S::kAhead; ++step) {
        if (step < steps) load_step<S>(job, base + step * S::kStageBytes, row, column, step);
        copy_commit();
    }
    for (int step = 0; step < steps; ++step) {
        copy_wait<S::kAhead - 1>();
        wgmma_publish();
        __syncthreads();  // the step has arrived, and the products of two steps ago are done
        const uint32_t stage = base + step % S::kStages * S::kStageBytes;
        const uint32_t rows = stage + group_row * S::kK * 2, columns = stage + S::kRowBytes;
        wgmma_begin();
        if constexpr (kExact) {
            multiply<S>(partial_acc, rows, columns + S::kPlaneBytes, step % kRunSteps);
            multiply<S>(partial_acc, rows + S::kPlaneBytes, columns, 1);
            multiply<S>(partial_acc, rows, columns, 1);
        } else {
            multiply<S>(acc, rows, columns, step);
        }
        wgmma_commit();
        if (!kExact) wgmma_wait<1>();
        const int ahead = step + S::kAhead;
        if (ahead < steps) load_step<S>(job, base + ahead % S::kStages * S::kStageBytes, row, column, ahead);
        copy_commit();
        // `padded_D` is a multiple of the run length. The wait also covers the steps before.
        if constexpr (kExact) {
            if (step % kRunSteps == kRunSteps - 1) {
                wgmma_wait<0>();
                wgmma_hold(partial_acc);
#pragma unroll
                for (int i = 0; i < S::kAccumulators; ++i) acc[i] += partial_acc[i];
            }
        }
    }
    wgmma_wait<0>();
    wgmma_hold(acc);
    copy_wait<0>();
    __syncthreads();  // the next tile overwrites the stages
    const int r = threadIdx.x / kWarp * 16 + lane_id() / 4, c = lane_id() % 4 * 2;
    if (tiles.is_inside(tile)) {
        tiles.store_inside(tile, r, c, acc);
    } else {
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
            tiles.store(tile, r, c + 8 * n, acc[4 * n], acc[4 * n + 1]);
            tiles.store(tile, r + 8, c + 8 * n, acc[4 * n + 2], acc[4 * n + 3]);
        }
    }
}

template <Pairs kPairs, bool kExact>
__global__ void __launch_bounds__(kThreads, 1) gram_tiles_sm90(Job job, int strip) {
    constexpr int kColumns = kExact ? kExactColumns : kFastColumns;
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ int before[kPairs == Pairs::kSymmetric ? kMaxPackedRows : 1];
    const TileList<kPairs, kColumns> tiles(job, strip, before);
    const uint32_t base = shared_address(shared);
    Tile tile;
    if constexpr (kExact || kPairs != Pairs::kSymmetric) {
        for (int index = blockIdx.x; index < tiles.count; index += gridDim.x)
            if (tiles.find(index, tile)) work<kExact, kColumns>(job, tiles, tile, base);
    } else {
        // The last round rarely has work for every block. If half of them would be idle, two blocks share a tile.
        const int blocks = gridDim.x, rest = tiles.count % blocks;
        const int whole = 2 * rest <= blocks ? tiles.count - rest : tiles.count;
        for (int index = blockIdx.x; index < whole; index += blocks)
            if (tiles.find(index, tile)) work<kExact, kColumns>(job, tiles, tile, base);
        const int shared_tile = whole + blockIdx.x / 2;
        if (shared_tile < tiles.count && tiles.find(shared_tile, tile)) {
            tile.width = kColumns / 2;
            tile.column += blockIdx.x % 2 * tile.width;
            if (tile.column < tile.row + kTile) work<kExact, kColumns / 2>(job, tiles, tile, base);
        }
    }
}

template <Pairs kPairs, bool kExact>
cudaError_t launch(const Job& job, int strip, int sms, cudaStream_t stream) {
    using S = Shape<kExact, kExact ? kExactColumns : kFastColumns>;
    const auto kernel = gram_tiles_sm90<kPairs, kExact>;
    constexpr int kBytes = S::kStages * S::kStageBytes;
    const cudaError_t raised = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (raised != cudaSuccess) return raised;
    kernel<<<sms, kThreads, kBytes, stream>>>(job, strip);
    return cudaGetLastError();
}

template <Pairs kPairs>
cudaError_t launch(const Job& job, int strip, int sms, cudaStream_t stream) {
    return job.exact_products ? launch<kPairs, true>(job, strip, sms, stream)
                              : launch<kPairs, false>(job, strip, sms, stream);
}

}  // namespace

cudaError_t gram_sm90(const Job& job, Pairs pairs, int strip, int sms, cudaStream_t stream) {
    switch (pairs) {
        case Pairs::kSymmetric: return launch<Pairs::kSymmetric>(job, strip, sms, stream);
        case Pairs::kStrip: return launch<Pairs::kStrip>(job, strip, sms, stream);
        case Pairs::kDiagonal: return launch<Pairs::kDiagonal>(job, strip, sms, stream);
        default: return launch<Pairs::kAnchors>(job, strip, sms, stream);
    }
}

}  // namespace tango
