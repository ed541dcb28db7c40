// What gram.cu and gram_sm90.cu share: the order of the tiles, the layout of rows in shared memory, and the storing of
// inner products.
#pragma once

#include "primitives.cuh"

namespace tango {

// 128 rows of a pool and some of its columns.
struct Tile {
    MergePool pool;
    int row, column;  // first ones, within the pool
    int width;        // columns of the tile
    int columns;      // of the pool: all entries, or its anchors
    float* gram;      // the Gram matrix of the pool, or the strip
    float* rows;      // the first row in it
};

template <Pairs kPairs, int kColumns>
class TileList {
  public:
    int count;  // tiles to visit; some may be empty

    // `before` has kMaxPackedRows elements if pairs are symmetric.
    __device__ TileList(const Job& job, int strip, int* before)
        : job_(job), first_row_(strip * job.strip_tile_rows), before_(before) {
        rows_ = *job.tile_rows;
        count = 0;
        if ((kPairs == Pairs::kSymmetric) != *job.packed) return;
        if (kPairs == Pairs::kSymmetric) {
            for (int start = 0; start < rows_; start += blockDim.x) {
                const int t = start + threadIdx.x;
                int total;
                const int tiles = t < rows_ ? (job.tile_row[t].index * kTile + kTile - 1) / kColumns + 1 : 0;
                const int sum = block_exclusive_sum(tiles, total);
                if (t < rows_) before[t] = count + sum;
                count += total;
            }
            __syncthreads();
        } else if (kPairs == Pairs::kDiagonal) {
            count = rows_;
        } else {
            count = max(strip_rows(), 0) * ceil_div(job.N, kColumns);
        }
    }

    // False if the tile is outside its pool.
    __device__ bool find(int index, Tile& tile) const {
        int t = index, column = 0;
        if (kPairs == Pairs::kSymmetric) {
            t = 0;
            for (int step = kMaxPackedRows / 2; step > 0; step /= 2)
                if (t + step < rows_ && before_[t + step] <= index) t += step;
            column = (index - before_[t]) * kColumns;
        } else if (kPairs != Pairs::kDiagonal) {
            t = first_row_ + index % strip_rows();  // concurrent tiles share columns, of which there are more
            column = index / strip_rows() * kColumns;
        }
        const TileRow found = job_.tile_row[t];
        tile.pool = job_.merge_pool[found.pool];
        tile.row = found.index * kTile;
        tile.column = kPairs == Pairs::kDiagonal ? tile.row : column;
        tile.width = kColumns;
        tile.columns = kPairs == Pairs::kAnchors ? tile.pool.anchors : tile.pool.count;
        const int stored = kPairs == Pairs::kSymmetric ? tile.row : (t - first_row_) * kTile;
        tile.gram = job_.gram + (kPairs == Pairs::kSymmetric ? tile.pool.gram : 0);
        tile.rows = tile.gram + static_cast<size_t>(stored) * tile.pool.ld;
        return tile.column < tile.columns;
    }

    __device__ int row_token(const Tile& tile, int r) const {
        return job_.context[tile.pool.first + min(tile.row + r, tile.pool.count - 1)];
    }

    __device__ int column_token(const Tile& tile, int c) const {
        const int* tokens = kPairs == Pairs::kAnchors ? job_.anchor_tokens : job_.context;
        return tokens[tile.pool.first + min(tile.column + c, tile.columns - 1)];
    }

    // Stores the products of row r with columns c and c + 1 of the tile; c is even. With symmetric pairs it stores
    // those below the diagonal twice, so that both elements have the same bits.
    __device__ void store(const Tile& tile, int r, int c, float first, float second) const {
        const int i = tile.row + r, j = tile.column + c;
        if (i >= tile.pool.count) return;
        first *= kGramScale;
        second *= kGramScale;
        const int ld = tile.pool.ld;
        float* place = tile.rows + static_cast<size_t>(r) * ld + j;
        if (kPairs == Pairs::kSymmetric) {
            if (j > i) return;
            float* mirror = tile.gram + static_cast<size_t>(j) * ld + i;
            mirror[0] = first;
            if (j < i) {
                *reinterpret_cast<float2*>(place) = make_float2(first, second);
                mirror[ld] = second;
            } else {
                place[0] = first;
            }
        } else if (kPairs != Pairs::kDiagonal && j < tile.columns) {
            *reinterpret_cast<float2*>(place) = make_float2(first, second);  // `ld` has room for one more
        }
        if (kPairs == Pairs::kSymmetric || kPairs == Pairs::kDiagonal) {
            if (j == i) job_.norm[tile.pool.aligned + i] = first;
            if (j + 1 == i) job_.norm[tile.pool.aligned + i] = second;
        }
    }

    // Whether the whole tile is in its pool, and below the diagonal if pairs are symmetric.
    __device__ bool is_inside(const Tile& tile) const {
        if (kPairs == Pairs::kDiagonal || tile.row + kTile > tile.pool.count) return false;
        return tile.column + tile.width <= (kPairs == Pairs::kSymmetric ? tile.row : tile.columns);
    }

    // Stores all products that a thread has of such a tile, with few instructions: per 8 columns, c and c + 1 of row r,
    // then those of row r + 8.
    template <int kAccumulators>
    __device__ void store_inside(const Tile& tile, int r, int c, const float (&acc)[kAccumulators]) const {
        const int ld = tile.pool.ld;
        float* place = tile.rows + static_cast<size_t>(r) * ld + tile.column + c;
        float* lower = place + 8 * ld;
        float* mirror = tile.gram + static_cast<size_t>(tile.column + c) * ld + tile.row + r;
#pragma unroll
        for (int n = 0; n < kAccumulators / 4; ++n) {
            const float a = acc[4 * n] * kGramScale, b = acc[4 * n + 1] * kGramScale;
            const float d = acc[4 * n + 2] * kGramScale, e = acc[4 * n + 3] * kGramScale;
            reinterpret_cast<float2*>(place)[4 * n] = make_float2(a, b);
            reinterpret_cast<float2*>(lower)[4 * n] = make_float2(d, e);
            if (kPairs == Pairs::kSymmetric) {
                mirror[0] = a;
                mirror[8] = d;
                mirror[ld] = b;
                mirror[ld + 8] = e;
                mirror += 8 * ld;
            }
        }
    }

  private:
    __device__ int strip_rows() const { return min(job_.strip_tile_rows, rows_ - first_row_); }

    const Job& job_;
    int first_row_, rows_;
    const int* before_;
};

// Offset of a 16-byte word in shared memory, with eight or four words per row. One word of eight adjacent rows, and the
// words of one row, are in different banks. Hopper's wgmma requires this layout, for rows of 128 or 64 bytes.
template <int kWords>
__device__ uint32_t swizzled(int row, int word) {
    return (row * kWords + (kWords == 8 ? word ^ (row & 7) : word ^ (row >> 1 & 3))) * 16;
}

// Copies a step's words of kPasses rows of one operand: this thread's row, and every kStride-th row after it.
template <int kWords, int kPasses, int kStride>
__device__ void load_rows(const __half* rotated, uint32_t to, const uint32_t (&words)[kPasses], int step) {
    const uint4* source = reinterpret_cast<const uint4*>(rotated) + step * kWords;
    const int word = threadIdx.x % kWords, row = threadIdx.x / kWords;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass)
        copy_async(to + swizzled<kWords>(row + pass * kStride, word), source + words[pass]);
}

cudaError_t gram_sm90(const Job& job, Pairs pairs, int strip, int sms, cudaStream_t stream);

}  // namespace tango
