// Attention of a pass of tokens over the cache (tango/attention.h).
//
// append() puts rotated keys, and values, into the cache. Then a block of attend() has some rows of queries of one head
// of the cache: the queries that share it lie one behind the other, token by token, so that keys and values which are in
// shared memory serve all of them. It goes over the cache in tiles while the next is on its way, and keeps of each row
// the greatest score, the sum of weights and the mixed values so far (FlashAttention, arXiv 2205.14135, 2307.08691).
#include <cuda_fp16.h>

#include <climits>

#include "check.h"
#include "launch.cuh"
#include "mma.cuh"
#include "tango/attention.h"
#include "warp.cuh"

namespace tango {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kAppendThreads = 128;

struct Pass {
    TangoAttentionShape shape;
    TangoAttentionTensors tensors;

    __device__ int group() const { return shape.heads / shape.kv_heads; }
    __device__ int columns() const { return (shape.heads + 2 * shape.kv_heads) * shape.head_width; }
    // Position of the pass's first token.
    __device__ int begin() const { return *tensors.last + 1 - shape.tokens; }
};

struct alignas(16) Word {
    static constexpr int kSize = 8;
    __half2 at[kSize / 2];
};

__device__ inline Word load(const void* from, size_t index) {
    return *reinterpret_cast<const Word*>(static_cast<const __half*>(from) + index);
}

__device__ inline void store(void* to, size_t index, const Word& word) {
    *reinterpret_cast<Word*>(static_cast<__half*>(to) + index) = word;
}

// Eight columns of a token's queries, keys or values.
__device__ inline void load_biased(const Pass& pass, int token, int column, float2 (&sums)[4]) {
    const Word word = load(pass.tensors.packed, static_cast<size_t>(token) * pass.columns() + column);
    const Word bias = load(pass.tensors.bias, column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 a = __half22float2(word.at[i]), b = __half22float2(bias.at[i]);
        sums[i] = make_float2(a.x + b.x, a.y + b.y);
    }
}

// Dimensions d to d + 7 of a head that begins at a column, and those half a head behind, rotated and scaled.
__device__ inline void rotate(const Pass& pass, int token, int position, int column, int d, float scale, Word& low,
                              Word& high) {
    const int half = pass.shape.head_width / 2;
    float2 a[4], b[4];
    load_biased(pass, token, column + d, a);
    load_biased(pass, token, column + half + d, b);
    const size_t angle = static_cast<size_t>(position) * half + d;
    const Word cosines = load(pass.tensors.cosines, angle), sines = load(pass.tensors.sines, angle);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 cosine = __half22float2(cosines.at[i]), sine = __half22float2(sines.at[i]);
        low.at[i] = __floats2half2_rn((a[i].x * cosine.x - b[i].x * sine.x) * scale,
                                      (a[i].y * cosine.y - b[i].y * sine.y) * scale);
        high.at[i] = __floats2half2_rn((b[i].x * cosine.x + a[i].x * sine.x) * scale,
                                       (b[i].y * cosine.y + a[i].y * sine.y) * scale);
    }
}

// A thread has 16 dimensions of the key and of the value of a token.
__global__ void append(Pass pass) {
    const TangoAttentionShape& shape = pass.shape;
    const int half = shape.head_width / 2, parts = half / Word::kSize;
    const int index = blockIdx.x * kAppendThreads + threadIdx.x;
    if (index >= shape.tokens * shape.kv_heads * parts) return;
    const int token = index / (shape.kv_heads * parts), head = index / parts % shape.kv_heads;
    const int d = index % parts * Word::kSize, position = pass.begin() + token;
    const int key = (shape.heads + head) * shape.head_width, value = key + shape.kv_heads * shape.head_width;
    const size_t row = (static_cast<size_t>(head) * shape.capacity + position) * shape.head_width;
    Word low, high;
    rotate(pass, token, position, key, d, 1.0f, low, high);
    store(pass.tensors.keys, row + d, low);
    store(pass.tensors.keys, row + half + d, high);
#pragma unroll
    for (int at = d; at < shape.head_width; at += half) {
        float2 sums[4];
        load_biased(pass, token, value + at, sums);
        Word word;
#pragma unroll
        for (int i = 0; i < 4; ++i) word.at[i] = __floats2half2_rn(sums[i].x, sums[i].y);
        store(pass.tensors.values, row + at, word);
    }
}

// A block of attend(). Widths between those that there are kernels for are filled up with zeros.
template <int kHeadWidth, int kFragmentsOfWarp>
struct Tile {
    static constexpr int kWidth = kHeadWidth, kFragments = kFragmentsOfWarp;  // a fragment has 16 rows of queries
    static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kRows = kWarps * kFragments * 16;
    static constexpr int kKeys = kWidth > 128 ? 32 : 64;  // at a time
    static constexpr int kWords = kWidth / Word::kSize, kRowBytes = kWidth * 2;
    static constexpr int kQueryBytes = kRows * kRowBytes, kTileBytes = kKeys * kRowBytes;
    static constexpr int kBytes = kQueryBytes + 4 * kTileBytes;  // keys and values, twice
};

// Where a word of a row is in shared memory: eight rows' words of one column lie in different banks.
template <typename T>
__device__ inline uint32_t place(int row, int word) {
    return row * T::kRowBytes + (word ^ row % 8) * 16;
}

template <typename T>
__device__ inline void load_queries(const Pass& pass, int head, int first, unsigned char* to) {
    const TangoAttentionShape& shape = pass.shape;
    const int group = pass.group(), half = shape.head_width / 2, parts = half / Word::kSize;
    const float scale = rsqrtf(static_cast<float>(shape.head_width)) * kLog2E;  // weights are powers of 2
    for (int i = threadIdx.x; i < T::kRows * parts; i += T::kThreads) {
        const int r = i / parts, part = i % parts;
        const int token = min((first + r) / group, shape.tokens - 1);  // behind the last row, whatever is finite
        const int column = (head * group + (first + r) % group) * shape.head_width;
        Word low, high;
        rotate(pass, token, pass.begin() + token, column, part * Word::kSize, scale, low, high);
        *reinterpret_cast<Word*>(to + place<T>(r, part)) = low;
        *reinterpret_cast<Word*>(to + place<T>(r, parts + part)) = high;
    }
}

// Begins to copy a tile of keys and the values behind it; past the last position the last row comes again.
template <typename T>
__device__ inline void copy_tile(const Pass& pass, int head, int first, SharedAddress to) {
    const int words = pass.shape.head_width / Word::kSize, last = *pass.tensors.last;
    const size_t slab = static_cast<size_t>(head) * pass.shape.capacity;
#pragma unroll
    for (int i = threadIdx.x; i < T::kKeys * T::kWords; i += T::kThreads) {
        const int r = i / T::kWords, word = i % T::kWords;
        if (word >= words) continue;
        const size_t from = (slab + min(first + r, last)) * pass.shape.head_width + word * Word::kSize;
        copy_async(to + place<T>(r, word), static_cast<const __half*>(pass.tensors.keys) + from);
        copy_async(to + T::kTileBytes + place<T>(r, word), static_cast<const __half*>(pass.tensors.values) + from);
    }
}

// What a warp has of its rows so far. Of each fragment, a thread has two rows: its lane / 4, and 8 more.
template <typename T>
struct Rows {
    float mixed[T::kFragments][T::kWidth / 8][4] = {};
    float greatest[T::kFragments][2], total[T::kFragments][2] = {};
    int position[T::kFragments][2];  // up to which they attend

    __device__ Rows(const Pass& pass, int first) {
#pragma unroll
        for (int m = 0; m < T::kFragments; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = first + 16 * m + lane_id() / 4 + 8 * i;
                position[m][i] = pass.begin() + min(row / pass.group(), pass.shape.tokens - 1);
                greatest[m][i] = -INFINITY;
            }
    }
};

template <typename T>
using Scores = float[T::kFragments][T::kKeys / 8][4];

template <typename T>
__device__ inline void score(Scores<T>& scores, SharedAddress queries, SharedAddress keys, int row) {
    const int lane = lane_id();
    const int query = row + lane % 16, key = lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < T::kWidth / 16; ++k) {
        uint32_t a[T::kFragments][4];
#pragma unroll
        for (int m = 0; m < T::kFragments; ++m)
            load_matrices(a[m], queries + place<T>(query + 16 * m, 2 * k + lane / 16));
#pragma unroll
        for (int n = 0; n < T::kKeys / 16; ++n) {
            uint32_t b[4];
            load_matrices(b, keys + place<T>(16 * n + key, 2 * k + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < T::kFragments; ++m) {
                mma(scores[m][2 * n], a[m], {b[0], b[1]});
                mma(scores[m][2 * n + 1], a[m], {b[2], b[3]});
            }
        }
    }
}

// Leaves out the keys behind a row's position.
template <typename T>
__device__ inline void mask(Scores<T>& scores, const Rows<T>& rows, int first) {
#pragma unroll
    for (int m = 0; m < T::kFragments; ++m)
#pragma unroll
        for (int n = 0; n < T::kKeys / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (first + 8 * n + lane_id() % 4 * 2 + i % 2 > rows.position[m][i / 2]) scores[m][n][i] = -INFINITY;
}

// Turns scores into weights relative to the greatest so far, and what was there before into the same.
template <typename T>
__device__ inline void weigh(Scores<T>& scores, Rows<T>& rows) {
#pragma unroll
    for (int m = 0; m < T::kFragments; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float greatest = rows.greatest[m][i];
#pragma unroll
            for (int n = 0; n < T::kKeys / 8; ++n)
                greatest = fmaxf(greatest, fmaxf(scores[m][n][2 * i], scores[m][n][2 * i + 1]));
            greatest = fmaxf(greatest, __shfl_xor_sync(kAllLanes, greatest, 1));
            greatest = fmaxf(greatest, __shfl_xor_sync(kAllLanes, greatest, 2));
            const float before = exp2f(rows.greatest[m][i] - greatest);
            rows.greatest[m][i] = greatest;
            float total = 0.0f;
#pragma unroll
            for (int n = 0; n < T::kKeys / 8; ++n)
#pragma unroll
                for (int j = 2 * i; j < 2 * i + 2; ++j) {
                    scores[m][n][j] = exp2f(scores[m][n][j] - greatest);
                    total += scores[m][n][j];
                }
            rows.total[m][i] = rows.total[m][i] * before + total;
#pragma unroll
            for (int n = 0; n < T::kWidth / 8; ++n) {
                rows.mixed[m][n][2 * i] *= before;
                rows.mixed[m][n][2 * i + 1] *= before;
            }
        }
}

__device__ inline uint32_t pack(float a, float b) {
    const __half2 pair = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename T>
__device__ inline void mix(Rows<T>& rows, const Scores<T>& weights, SharedAddress values) {
    const int lane = lane_id();
#pragma unroll
    for (int k = 0; k < T::kKeys / 16; ++k) {
        uint32_t a[T::kFragments][4];
#pragma unroll
        for (int m = 0; m < T::kFragments; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&pair)[4] = weights[m][2 * k + i / 2];
                a[m][i] = pack(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
            }
#pragma unroll
        for (int n = 0; n < T::kWidth / 16; ++n) {
            uint32_t b[4];
            load_transposed(b, values + place<T>(16 * k + lane % 16, 2 * n + lane / 16));
#pragma unroll
            for (int m = 0; m < T::kFragments; ++m) {
                mma(rows.mixed[m][2 * n], a[m], {b[0], b[1]});
                mma(rows.mixed[m][2 * n + 1], a[m], {b[2], b[3]});
            }
        }
    }
}

template <typename T>
__device__ inline void write(const Pass& pass, Rows<T>& rows, int head, int first) {
    const TangoAttentionShape& shape = pass.shape;
    const int group = pass.group();
#pragma unroll
    for (int m = 0; m < T::kFragments; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float total = rows.total[m][i];
            total += __shfl_xor_sync(kAllLanes, total, 1);
            total += __shfl_xor_sync(kAllLanes, total, 2);
            const int row = first + 16 * m + lane_id() / 4 + 8 * i;
            if (row >= shape.tokens * group) continue;
            const size_t at = static_cast<size_t>(row / group) * shape.heads + head * group + row % group;
            __half* to = static_cast<__half*>(pass.tensors.mixed) + at * shape.head_width;
#pragma unroll
            for (int n = 0; n < T::kWidth / 8; ++n) {
                const int d = 8 * n + lane_id() % 4 * 2;
                if (d >= shape.head_width) break;
                *reinterpret_cast<__half2*>(to + d) = __floats2half2_rn(rows.mixed[m][n][2 * i] / total,
                                                                         rows.mixed[m][n][2 * i + 1] / total);
            }
        }
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads) attend(Pass pass) {
    unsigned char* shared = reinterpret_cast<unsigned char*>(shared_memory());
    const TangoAttentionShape& shape = pass.shape;
    const int head = blockIdx.x % shape.kv_heads;
    const int first = (gridDim.x - 1 - blockIdx.x) / shape.kv_heads * T::kRows;  // those with the most to do begin
    const int row = first + warp_id() * T::kFragments * 16;
    const int ends[] = {(first + T::kRows - 1) / pass.group(), (row + T::kFragments * 16 - 1) / pass.group()};
    const int tiles = ceil_div(pass.begin() + min(ends[0], shape.tokens - 1) + 1, T::kKeys);
    const int own = ceil_div(pass.begin() + min(ends[1], shape.tokens - 1) + 1, T::kKeys);  // that this warp needs
    if (shape.head_width < T::kWidth) {
        for (int i = threadIdx.x; i < T::kBytes / 16; i += T::kThreads) shared_memory()[i] = make_float4(0, 0, 0, 0);
        __syncthreads();
    }
    const SharedAddress base = shared_address(shared);
    copy_tile<T>(pass, head, 0, base + T::kQueryBytes);
    copy_commit();
    load_queries<T>(pass, head, first, shared);
    Rows<T> rows(pass, row);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        copy_wait<0>();
        __syncthreads();  // the tile is there for all, and the one before has been read by all
        const SharedAddress keys = base + T::kQueryBytes + tile % 2 * 2 * T::kTileBytes;
        if (tile + 1 < tiles)
            copy_tile<T>(pass, head, (tile + 1) * T::kKeys, base + T::kQueryBytes + (tile + 1) % 2 * 2 * T::kTileBytes);
        copy_commit();
        if (tile >= own) continue;
        Scores<T> scores = {};
        score<T>(scores, base, keys, row - first);
        if ((tile + 1) * T::kKeys > pass.begin() + row / pass.group()) mask<T>(scores, rows, tile * T::kKeys);
        weigh<T>(scores, rows);
        mix<T>(rows, scores, keys + T::kTileBytes);
    }
    write<T>(pass, rows, head, row);
}

int report(cudaError_t error) {
    if (error == cudaSuccess) return TANGO_OK;
    return fail(TANGO_CUDA_ERROR, "%s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
}

struct Gpu {
    int multiprocessors = 0, shared_bytes = 0;  // of a block, at most

    cudaError_t ask() {
        int device = 0;
        cudaError_t error = cudaGetDevice(&device);
        if (error == cudaSuccess)
            error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
        if (error == cudaSuccess)
            error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        return error;
    }
};

template <typename T>
int launch_attend(const Pass& pass, cudaStream_t stream) {
    const int rows = pass.shape.tokens * (pass.shape.heads / pass.shape.kv_heads);
    return report(
        launch(attend<T>, pass, ceil_div(rows, T::kRows) * pass.shape.kv_heads, T::kThreads, T::kBytes, stream));
}

// Larger tiles read less of shared memory for each row; smaller ones, where there are few, occupy more of the GPU.
template <int kWidth>
int launch_attend(const Pass& pass, const Gpu& gpu, cudaStream_t stream) {
    using Large = Tile<kWidth, (kWidth > 128) ? 1 : 2>;
    using Small = Tile<kWidth, 1>;
    if (Small::kBytes > gpu.shared_bytes)
        return fail(TANGO_BAD_ARGUMENT, "head_width is %d: it takes %d bytes of shared memory, this GPU has %d",
                    pass.shape.head_width, Small::kBytes, gpu.shared_bytes);
    const int rows = pass.shape.tokens * (pass.shape.heads / pass.shape.kv_heads);
    const bool many = ceil_div(rows, Large::kRows) * pass.shape.kv_heads >= 4 * gpu.multiprocessors;
    return many && Large::kBytes <= gpu.shared_bytes ? launch_attend<Large>(pass, stream)
                                                     : launch_attend<Small>(pass, stream);
}

int enqueue(const Pass& pass, cudaStream_t stream) {
    const TangoAttentionShape& shape = pass.shape;
    Gpu gpu;
    if (int status = report(gpu.ask())) return status;
    const int words = shape.tokens * shape.kv_heads * (shape.head_width / 2 / Word::kSize);
    if (int status = report(launch(append, pass, ceil_div(words, kAppendThreads), kAppendThreads, 0, stream)))
        return status;
    if (shape.head_width <= 64) return launch_attend<64>(pass, gpu, stream);
    if (shape.head_width <= 128) return launch_attend<128>(pass, gpu, stream);
    return launch_attend<TANGO_MAX_HEAD_WIDTH>(pass, gpu, stream);
}

int check(const TangoAttentionShape& shape, const TangoAttentionTensors& tensors) {
    if (int status = check_ranges({{"tokens", shape.tokens, 1, shape.capacity},
                                   {"kv_heads", shape.kv_heads, 1, 1 << 10},
                                   {"heads", shape.heads, shape.kv_heads, 1 << 10},
                                   {"head_width", shape.head_width, 16, TANGO_MAX_HEAD_WIDTH}}))
        return status;
    if (int status = check_ranges({{"heads % kv_heads", shape.heads % shape.kv_heads, 0, 0},
                                   {"head_width % 16", shape.head_width % 16, 0, 0},
                                   {"tokens * heads", 1LL * shape.tokens * shape.heads, 1, INT_MAX / 256}}))
        return status;
    const struct {
        const char* name;
        const void* pointer;
    } all[] = {{"packed", tensors.packed}, {"bias", tensors.bias},     {"cosines", tensors.cosines},
               {"sines", tensors.sines},   {"keys", tensors.keys},     {"values", tensors.values},
               {"mixed", tensors.mixed}};
    for (const auto& tensor : all)
        if (int status = check_pointer(tensor.name, tensor.pointer, 16)) return status;
    return check_pointer("last", tensors.last, sizeof(int32_t));
}

}  // namespace
}  // namespace tango

int tango_attention_enqueue(const TangoAttentionShape* shape, const TangoAttentionTensors* tensors, void* stream) {
    if (int status = tango::check(*shape, *tensors)) return status;
    return tango::enqueue({*shape, *tensors}, static_cast<cudaStream_t>(stream));
}
