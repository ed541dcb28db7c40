// Attention of a prefill (tango/attention.h), and which kernel computes it: this file's, or that of prefill_sm90.cu.
//
// First append_kv() writes rotated keys, and values, to the cache. Then each block of prefill_attention() handles some
// query rows of one KV head. A row is one query head at one token. The query heads of a KV head are adjacent rows,
// token by token, so keys and values in shared memory serve all of them. The block goes over the cache tile by tile and
// copies the next tile meanwhile.
#include "attention/flash.cuh"
#include "attention/pass.cuh"
#include "common/check.h"
#include "common/device.h"
#include "common/platform.cuh"
#include "tango/attention.h"

namespace tango {
namespace {

constexpr int kAppendThreads = 128;

// Eight columns of a token's query, key or value, with their bias.
__device__ inline void load_biased(const Pass& pass, int token, int column, float2 (&biased)[4]) {
    const Half8 vector = load(pass.tensors.qkv, static_cast<size_t>(token) * pass.columns() + column);
    const Half8 bias = load(pass.tensors.bias, column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 a = __half22float2(vector.at[i]), b = __half22float2(bias.at[i]);
        biased[i] = make_float2(a.x + b.x, a.y + b.y);
    }
}

// Dimensions d to d + 7 of the head at a column, and their partners half a head later, rotated and scaled.
__device__ inline void rotate(const Pass& pass, int token, int column, int d, float scale, Half8& low, Half8& high) {
    const int half = pass.shape.head_dim / 2;
    float2 a[4], b[4];
    load_biased(pass, token, column + d, a);
    load_biased(pass, token, column + half + d, b);
    const size_t angle = static_cast<size_t>(pass.angle_row(token)) * half + d;
    const Half8 cosines = load(pass.tensors.cosines, angle), sines = load(pass.tensors.sines, angle);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 cosine = __half22float2(cosines.at[i]), sine = __half22float2(sines.at[i]);
        low.at[i] = __floats2half2_rn((a[i].x * cosine.x - b[i].x * sine.x) * scale,
                                      (a[i].y * cosine.y - b[i].y * sine.y) * scale);
        high.at[i] = __floats2half2_rn((b[i].x * cosine.x + a[i].x * sine.x) * scale,
                                       (b[i].y * cosine.y + a[i].y * sine.y) * scale);
    }
}

// Of the scores, for a softmax in base 2. Queries are multiplied by it.
__device__ inline float score_scale(const Pass& pass) {
    return rsqrtf(static_cast<float>(pass.shape.head_dim)) * kLog2E;
}

// Each thread handles 16 dimensions of one token's key and value, or with kQueries of a query, which it writes to the
// output.
template <bool kQueries>
__global__ void append_kv(Pass pass) {
    const TangoAttentionShape& shape = pass.shape;
    const int half = shape.head_dim / 2, parts = half / Half8::kSize;
    const int heads = shape.kv_heads + (kQueries ? shape.heads : 0);
    const int index = blockIdx.x * kAppendThreads + threadIdx.x;
    if (index >= shape.tokens * heads * parts) return;
    const int token = index / (heads * parts), head = index / parts % heads;
    const int d = index % parts * Half8::kSize, position = pass.first_position() + token;
    if (kQueries && head >= shape.kv_heads) {
        const int column = (head - shape.kv_heads) * shape.head_dim;
        const size_t query = static_cast<size_t>(token) * shape.heads * shape.head_dim + column;
        Half8 low, high;
        rotate(pass, token, column, d, score_scale(pass), low, high);
        store(pass.tensors.attn_out, query + d, low);
        store(pass.tensors.attn_out, query + half + d, high);
        return;
    }
    const int key = (shape.heads + head) * shape.head_dim, value = key + shape.kv_heads * shape.head_dim;
    const size_t row = (static_cast<size_t>(head) * shape.capacity + position) * shape.head_dim;
    Half8 low, high;
    rotate(pass, token, key, d, 1.0f, low, high);
    store(pass.tensors.keys, row + d, low);
    store(pass.tensors.keys, row + half + d, high);
#pragma unroll
    for (int at = d; at < shape.head_dim; at += half) {
        float2 biased[4];
        load_biased(pass, token, value + at, biased);
        Half8 vector;
#pragma unroll
        for (int i = 0; i < 4; ++i) vector.at[i] = __floats2half2_rn(biased[i].x, biased[i].y);
        store(pass.tensors.values, row + at, vector);
    }
}

// What a block of prefill_attention() works on. Zeros pad a head_dim to the next one that has a kernel.
template <int kHeadDim, int kFragmentsPerWarp>
struct Tile {
    static constexpr int kWidth = kHeadDim, kFragments = kFragmentsPerWarp;  // a fragment is 16 query rows
    static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kRows = kWarps * kFragments * 16;
    static constexpr int kKeys = kWidth > 128 ? 32 : 64;  // of a tile of the cache
    static constexpr int kVectors = kWidth / Half8::kSize, kRowBytes = kWidth * 2;
    static constexpr int kQueryBytes = kRows * kRowBytes, kTileBytes = kKeys * kRowBytes;
    static constexpr int kBytes = kQueryBytes + 4 * kTileBytes;  // keys and values, double-buffered

    // The vectors of one column in eight adjacent rows are in different banks.
    __device__ static uint32_t offset(int row, int vector) { return row * kRowBytes + (vector ^ row % 8) * 16; }
};

template <typename T>
__device__ inline void load_queries(const Pass& pass, int head, int first, unsigned char* to) {
    const TangoAttentionShape& shape = pass.shape;
    const int group_size = pass.group_size(), half = shape.head_dim / 2, parts = half / Half8::kSize;
    const float scale = score_scale(pass);
    for (int i = threadIdx.x; i < T::kRows * parts; i += T::kThreads) {
        const int r = i / parts, part = i % parts;
        const int token = min((first + r) / group_size, shape.tokens - 1);  // rows past the last one repeat it
        const int column = (head * group_size + (first + r) % group_size) * shape.head_dim;
        Half8 low, high;
        rotate(pass, token, column, part * Half8::kSize, scale, low, high);
        store(to + T::offset(r, part), low);
        store(to + T::offset(r, parts + part), high);
    }
}

// Starts copying a tile of keys, followed by the values. Rows past the last position repeat the last one.
template <typename T>
__device__ inline void copy_tile(const Pass& pass, int head, int first, SharedAddress to) {
    const int vectors = pass.shape.head_dim / Half8::kSize, last = pass.last_position();
    const size_t first_row = static_cast<size_t>(head) * pass.shape.capacity;
#pragma unroll
    for (int i = threadIdx.x; i < T::kKeys * T::kVectors; i += T::kThreads) {
        const int r = i / T::kVectors, vector = i % T::kVectors;
        if (vector >= vectors) continue;
        const size_t from = (first_row + min(first + r, last)) * pass.shape.head_dim + vector * Half8::kSize;
        copy_async(to + T::offset(r, vector), static_cast<const __half*>(pass.tensors.keys) + from);
        copy_async(to + T::kTileBytes + T::offset(r, vector), static_cast<const __half*>(pass.tensors.values) + from);
    }
}

// The last position that each row of a thread attends to.
template <typename T>
struct LastPositions {
    int of[T::kFragments][2];

    __device__ LastPositions(const Pass& pass, int first) {
#pragma unroll
        for (int m = 0; m < T::kFragments; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = first + 16 * m + lane_id() / 4 + 8 * i;
                of[m][i] = pass.first_position() + min(row / pass.group_size(), pass.shape.tokens - 1);
            }
    }
};

// Masks the keys after a row's last position.
template <typename T>
__device__ inline void mask(Scores<T>& scores, const LastPositions<T>& last, int first) {
#pragma unroll
    for (int m = 0; m < T::kFragments; ++m)
#pragma unroll
        for (int n = 0; n < T::kKeys / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (first + 8 * n + lane_id() % 4 * 2 + i % 2 > last.of[m][i / 2]) scores[m][n][i] = -INFINITY;
}

template <typename T>
__device__ inline void write_rows(const Pass& pass, RowState<T>& rows, int head, int first) {
    const TangoAttentionShape& shape = pass.shape;
    const int group_size = pass.group_size();
#pragma unroll
    for (int m = 0; m < T::kFragments; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float row_sum = quad_sum(rows.row_sum[m][i]);
            const int row = first + 16 * m + lane_id() / 4 + 8 * i;
            if (row >= shape.tokens * group_size) continue;
            const size_t at =
                static_cast<size_t>(row / group_size) * shape.heads + head * group_size + row % group_size;
            __half* to = static_cast<__half*>(pass.tensors.attn_out) + at * shape.head_dim;
#pragma unroll
            for (int n = 0; n < T::kWidth / 8; ++n) {
                const int d = 8 * n + lane_id() % 4 * 2;
                if (d >= shape.head_dim) break;
                *reinterpret_cast<__half2*>(to + d) =
                    __floats2half2_rn(rows.attn_out[m][n][2 * i] / row_sum, rows.attn_out[m][n][2 * i + 1] / row_sum);
            }
        }
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads) prefill_attention(Pass pass) {
    unsigned char* shared = reinterpret_cast<unsigned char*>(shared_memory());
    const TangoAttentionShape& shape = pass.shape;
    const int head = blockIdx.x % shape.kv_heads;
    const int first =
        (gridDim.x - 1 - blockIdx.x) / shape.kv_heads * T::kRows;  // the rows with the most keys start first
    const int row = first + warp_id() * T::kFragments * 16;
    const int ends[] = {(first + T::kRows - 1) / pass.group_size(), (row + T::kFragments * 16 - 1) / pass.group_size()};
    const int tiles = ceil_div(pass.first_position() + min(ends[0], shape.tokens - 1) + 1, T::kKeys);
    const int warp_tiles =
        ceil_div(pass.first_position() + min(ends[1], shape.tokens - 1) + 1, T::kKeys);  // needed by this warp
    if (shape.head_dim < T::kWidth) {
        for (int i = threadIdx.x; i < T::kBytes / 16; i += T::kThreads) shared_memory()[i] = make_float4(0, 0, 0, 0);
        __syncthreads();
    }
    const SharedAddress base = shared_address(shared);
    copy_tile<T>(pass, head, 0, base + T::kQueryBytes);
    copy_commit();
    load_queries<T>(pass, head, first, shared);
    RowState<T> rows;
    const LastPositions<T> last(pass, row);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        copy_wait<0>();
        __syncthreads();  // the tile is complete, and no thread reads the one before any more
        const SharedAddress keys = base + T::kQueryBytes + tile % 2 * 2 * T::kTileBytes;
        if (tile + 1 < tiles)
            copy_tile<T>(pass, head, (tile + 1) * T::kKeys, base + T::kQueryBytes + (tile + 1) % 2 * 2 * T::kTileBytes);
        copy_commit();
        if (tile >= warp_tiles) continue;
        Scores<T> scores = {};
        compute_qk<T>(scores, base, keys, row - first);
        if ((tile + 1) * T::kKeys > pass.first_position() + row / pass.group_size())
            mask<T>(scores, last, tile * T::kKeys);
        update_softmax<T>(scores, rows, 1.0f);
        accumulate_pv<T>(rows, scores, keys + T::kTileBytes);
    }
    write_rows<T>(pass, rows, head, row);
}

template <typename T>
int launch_attention(const Pass& pass, cudaStream_t stream) {
    const int rows = pass.shape.tokens * (pass.shape.heads / pass.shape.kv_heads);
    const int blocks = ceil_div(rows, T::kRows) * pass.shape.kv_heads;
    return cuda_status(launch(prefill_attention<T>, pass, blocks, T::kThreads, T::kBytes, stream), "attention");
}

// Large tiles read less shared memory per row. Small tiles occupy more SMs where there are few rows.
template <int kWidth>
int launch_attention(const Pass& pass, const DeviceProperties& gpu, cudaStream_t stream) {
    using Large = Tile<kWidth, (kWidth > 128) ? 1 : 2>;
    using Small = Tile<kWidth, 1>;
    if (Small::kBytes > gpu.shared_bytes)
        return fail(TANGO_BAD_ARGUMENT, "head_dim is %d: it needs %d bytes of shared memory, this GPU has %d",
                    pass.shape.head_dim, Small::kBytes, gpu.shared_bytes);
    const int rows = pass.shape.tokens * (pass.shape.heads / pass.shape.kv_heads);
    const bool many = ceil_div(rows, Large::kRows) * pass.shape.kv_heads >= 4 * gpu.sms;
    return many && Large::kBytes <= gpu.shared_bytes ? launch_attention<Large>(pass, stream)
                                                     : launch_attention<Small>(pass, stream);
}

template <bool kQueries>
int launch_append(const Pass& pass, cudaStream_t stream) {
    const TangoAttentionShape& shape = pass.shape;
    const int heads = shape.kv_heads + (kQueries ? shape.heads : 0);
    const int vectors = shape.tokens * heads * (shape.head_dim / 2 / Half8::kSize);
    return cuda_status(launch(append_kv<kQueries>, pass, ceil_div(vectors, kAppendThreads), kAppendThreads, 0, stream),
                       "attention");
}

#ifdef TANGO_SM90A
// Whether Hopper's kernel is the faster one: its tiles are large, and a block has an SM for itself.
bool suits_warpgroups(const Pass& pass, const DeviceProperties& gpu) {
    constexpr int kLeastRows = 128;  // of a KV head: fewer would leave warpgroups idle
    const TangoAttentionShape& shape = pass.shape;
    return gpu.major == 9 && (shape.head_dim == 64 || shape.head_dim == 128) &&
           shape.tokens * pass.group_size() >= kLeastRows && shape.tokens * shape.heads >= gpu.sms * kLeastRows / 2;
}
#endif

int enqueue(const Pass& pass, cudaStream_t stream) {
    DeviceProperties gpu;
    if (int status = cuda_status(query_device(gpu), "attention")) return status;
#ifdef TANGO_SM90A
    if (suits_warpgroups(pass, gpu)) {
        if (int status = launch_append<true>(pass, stream)) return status;
        return cuda_status(prefill_attention_sm90(pass, gpu.sms, stream), "attention");
    }
#endif
    if (int status = launch_append<false>(pass, stream)) return status;
    if (pass.shape.head_dim <= 64) return launch_attention<64>(pass, gpu, stream);
    if (pass.shape.head_dim <= 128) return launch_attention<128>(pass, gpu, stream);
    return launch_attention<TANGO_MAX_HEAD_DIM>(pass, gpu, stream);
}

int check_tensors(const TangoAttentionTensors& tensors) {
    const struct {
        const char* name;
        const void* pointer;
    } all[] = {{"qkv", tensors.qkv},          {"bias", tensors.bias}, {"cosines", tensors.cosines},
               {"sines", tensors.sines},      {"keys", tensors.keys}, {"values", tensors.values},
               {"attn_out", tensors.attn_out}};
    for (const auto& tensor : all)
        if (int status = check_pointer(tensor.name, tensor.pointer, 16)) return status;
    return check_pointer("last", tensors.last, sizeof(int32_t));
}

}  // namespace
}  // namespace tango

int tango_attention_enqueue(const TangoAttentionShape* shape, const TangoAttentionTensors* tensors, void* stream) {
    if (int status = tango::check_pointer("shape", shape, 1)) return status;
    if (int status = tango::check_pointer("tensors", tensors, 1)) return status;
    if (int status = tango::check_shape(*shape)) return status;
    if (int status = tango::check_tensors(*tensors)) return status;
    return tango::enqueue({*shape, *tensors}, static_cast<cudaStream_t>(stream));
}
