// Attention of a batched step. Each sequence is cut into chunks, and a block handles one chunk of one sequence for the
// query heads of one KV head. Tensor cores multiply: eight queries are the columns of an `mma`, positions or dimensions
// its rows. merge_parts() combines the chunks.
#pragma once

#include "batch.cuh"

namespace tango {

constexpr int kMaxDimTiles = 16;                       // of a head, of 16 dimensions
constexpr int kWarpDims = kMaxDimTiles / kBatchWarps;  // of them, that a warp has

// The shared memory of a block for attention, in the place of a GEMV's input and ring.
struct AttentionShared {
    Fragment* queries;    // [tiles of queries, head_dim / kFragmentRows]
    Fragment* weights;    // [kv_tile_size / kFragmentRows], of the softmax, for a tile of queries
    float4* partial;      // [groups of warps, tiles of head_dim, lanes], of the output
    float* scores;        // [kTileQueries, kv_tile_size + 4]
    float3* softmax;      // [kTileQueries]: row_max, row_sum, factor that rescales the earlier tiles
    char *keys, *values;  // [kv_tile_size], a row of each `pitch` bytes
    char* end;
    int pitch;  // odd in units of 16 bytes: eight rows are in all banks

    __host__ __device__ AttentionShared(const BatchStep& step, char* memory) {
        pitch = step.shape.head_dim * static_cast<int>(sizeof(__half)) + 16;
        const auto take = [&](auto*& pointer, int count) {
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory);
            memory += ceil_div(count * static_cast<int>(sizeof(*pointer)), 16) * 16;
        };
        take(queries, ceil_div(step.group_size(), kTileQueries) * (step.shape.head_dim / kFragmentRows) * kWarp);
        take(weights, step.kv_tile_size / kFragmentRows * kWarp);
        take(partial, kMaxDimTiles * kWarp);
        take(scores, kTileQueries * (step.kv_tile_size + 4));
        take(softmax, kTileQueries);
        take(keys, step.kv_tile_size * pitch);
        take(values, step.kv_tile_size * pitch);
        end = memory;
    }
};

// What a block works on in attention: one chunk of one KV head of one sequence.
struct BatchChunk {
    const BatchStep& step;
    const BatchSequence& sequence;
    int index, kv_head, begin, end;  // of the sequence: its index, and positions [begin, end)
    __half *keys, *values;           // the KV head's rows of the cache

    __device__ BatchChunk(const BatchStep& step, int index, int layer, int part)
        : step(step), sequence(step.sequences[index]), index(index) {
        part -= sequence.first_part;
        kv_head = part / sequence.kv_chunks;
        begin = (part - kv_head * sequence.kv_chunks) * sequence.kv_chunk_size;
        end = min(begin + sequence.kv_chunk_size, sequence.position + 1);
        const TangoDecodeCache cache = sequence.caches[layer];
        const size_t offset = static_cast<size_t>(kv_head) * sequence.capacity * step.shape.head_dim;
        keys = static_cast<__half*>(cache.keys) + offset;
        values = static_cast<__half*>(cache.values) + offset;
    }

    // Whether the token itself is in it.
    __device__ bool is_last() const { return end == sequence.position + 1; }

    // Starts copying the tile at a position to shared memory, up to position `until`.
    __device__ void copy_tile(const AttentionShared& own, int tile, int until) const {
        const int head_dim = step.shape.head_dim, vectors = head_dim / kVector;
        const int count = min(tile + step.kv_tile_size, until) - tile;
        const __half *const from_keys = keys + static_cast<size_t>(tile) * head_dim, *const from_values =
                                                                                         values +
                                                                                         static_cast<size_t>(tile) *
                                                                                             head_dim;
#pragma unroll 2
        for (int i = threadIdx.x; i < count * vectors; i += kBatchThreads) {
            const int row = i / vectors, to = row * own.pitch + (i - row * vectors) * 16;
            copy_async(shared_address(own.keys + to), from_keys + i * kVector);
            copy_async(shared_address(own.values + to), from_values + i * kVector);
        }
        copy_commit();
    }

    // Starts copying the first tile, except for the token's own row: load_token() adds it.
    __device__ void copy_first_tile(const AttentionShared& own) const {
        copy_tile(own, begin, min(end, sequence.position));
    }
};

// Two neighboring columns of query, key and value, with their bias.
__device__ inline float2 qkv_pair(const BatchChunk& chunk, const __half* bias, int column) {
    const BatchPartition& gemv = chunk.step.partitions[kQkv];
    const float* const from = chunk.step.qkv + static_cast<size_t>(chunk.index) * gemv.split_k * gemv.columns + column;
    float2 sum = __half22float2(*reinterpret_cast<const __half2*>(bias + column));
    add_splits(sum, from, gemv.split_k, gemv.columns);
    return sum;
}

// Stores dimensions d and d + 1 of a query as `mma` takes them, scaled.
__device__ inline void store_query(const BatchChunk& chunk, const AttentionShared& own, int query, int d, float2 pair) {
    const int head_dim = chunk.step.shape.head_dim;
    const float scale = rsqrtf(static_cast<float>(head_dim)) / kInputScale;
    const int fragment = query / kTileQueries * (head_dim / kFragmentRows) + d / kFragmentRows;
    uint32_t low;
    const uint32_t high = split_pair(pair.x * scale, pair.y * scale, low);
    uint32_t* const to =
        reinterpret_cast<uint32_t*>(own.queries + fragment * kWarp + query % kTileQueries * 4 + d % 8 / 2);
    to[d / 8 % 2] = high;
    to[2 + d / 8 % 2] = low;
}

// Loads the queries. In the sequence's last chunk it also writes the token's key and value to the cache, and to the
// tile if they belong there. A thread has two neighboring dimensions, and those that they are rotated with.
__device__ inline void load_token(const BatchChunk& chunk, const AttentionShared& own, const __half* bias,
                                  const float2* rope) {
    const TangoDecodeShape& shape = chunk.step.shape;
    const int group_size = chunk.step.group_size(), head_dim = shape.head_dim, half = head_dim / 2;
    const int key = (shape.heads + chunk.kv_head) * head_dim, value = key + shape.kv_heads * head_dim;
    const int position = chunk.sequence.position - chunk.begin;
    const bool in_tile = position < chunk.step.kv_tile_size;
#pragma unroll 1
    for (int i = threadIdx.x; i < (group_size + 2 * chunk.is_last()) * (half / 2); i += kBatchThreads) {
        const int q = i / (half / 2), d = 2 * (i - q * (half / 2));
        const int column = q < group_size ? (chunk.kv_head * group_size + q) * head_dim : q == group_size ? key : value;
        float2 a = qkv_pair(chunk, bias, column + d), b = qkv_pair(chunk, bias, column + half + d);
        if (q <= group_size) {
            const float4 angles = __ldcg(reinterpret_cast<const float4*>(rope + d));
            const float2 x = make_float2(angles.x, angles.y), y = make_float2(angles.z, angles.w);
            const float2 first = make_float2(a.x * x.x - b.x * x.y, a.y * y.x - b.y * y.y);
            b = make_float2(b.x * x.x + a.x * x.y, b.y * y.x + a.y * y.y);
            a = first;
        }
        if (q < group_size) {
            store_query(chunk, own, q, d, a);
            store_query(chunk, own, q, half + d, b);
            continue;
        }
        const __half2 first = __floats2half2_rn(a.x, a.y), second = __floats2half2_rn(b.x, b.y);
        const auto store = [&](__half* row) {
            *reinterpret_cast<__half2*>(row + d) = first;
            *reinterpret_cast<__half2*>(row + half + d) = second;
        };
        const bool is_key = q == group_size;
        store((is_key ? chunk.keys : chunk.values) + static_cast<size_t>(chunk.sequence.position) * head_dim);
        if (in_tile) store(reinterpret_cast<__half*>((is_key ? own.keys : own.values) + position * own.pitch));
    }
}

// Fills up the last 16 rows of values, which have a weight of zero. Keys are not filled up: what their scores are does
// not count, nor what those of queries are that fill up a tile.
__device__ inline void fill_up(const BatchChunk& chunk, const AttentionShared& own, int count) {
    const int vectors = chunk.step.shape.head_dim / kVector;
    const int end = ceil_div(count, kFragmentRows) * kFragmentRows;
    for (int i = threadIdx.x; i < (end - count) * vectors; i += kBatchThreads)
        reinterpret_cast<uint4*>(own.values + (count + i / vectors) * own.pitch)[i % vectors] = {};
}

// Scores of a tile of queries for the keys of a tile: a warp takes 16 keys at a time.
__device__ inline void compute_scores(const BatchChunk& chunk, const AttentionShared& own, const Fragment* queries,
                                      int count) {
    const int lane = opaque(lane_id()), steps = chunk.step.shape.head_dim / kFragmentRows;
    const int stride = chunk.step.kv_tile_size + 4;
#pragma unroll 1
    for (int first = warp_id() * kFragmentRows; first < count; first += kBatchWarps * kFragmentRows) {
        const SharedAddress keys = shared_address(own.keys + (first + lane % 16) * own.pitch + lane / 16 * 16);
        float sum[4] = {};
#pragma unroll 4
        for (int i = 0; i < steps; ++i) {
            uint32_t rows[4];
            load_matrices(rows, keys + i * kFragmentRows * static_cast<int>(sizeof(__half)));
            multiply_add(sum, rows, queries[i * kWarp + lane]);
        }
        float* const to = own.scores + lane % 4 * 2 * stride + first + lane / 4;
        to[0] = sum[0] * kInputScale;
        to[stride] = sum[1] * kInputScale;
        to[8] = sum[2] * kInputScale;
        to[stride + 8] = sum[3] * kInputScale;
    }
}

// Turns the scores of a tile into weights relative to the new row maximum, a warp per query.
__device__ inline void update_softmax(const BatchChunk& chunk, const AttentionShared& own, int queries, int count) {
    const int q = warp_id();
    const float* const scores = own.scores + q * (chunk.step.kv_tile_size + 4);
    const float3 before = own.softmax[q];
    float row_max = -INFINITY, row_sum = 0.0f;
#pragma unroll 2
    for (int j = lane_id(); j < count; j += kWarp) row_max = fmaxf(row_max, scores[j]);
    row_max = fmaxf(before.x, warp_max(row_max));
    const int end = ceil_div(count, kFragmentRows) * kFragmentRows;
#pragma unroll 2
    for (int j = 2 * lane_id(); j < end; j += 2 * kWarp) {
        const float a = q < queries && j < count ? expf(scores[j] - row_max) : 0.0f;
        const float b = q < queries && j + 1 < count ? expf(scores[j + 1] - row_max) : 0.0f;
        row_sum += a + b;
        uint32_t low;
        const uint32_t high = split_pair(a / kInputScale, b / kInputScale, low);
        uint32_t* const to = reinterpret_cast<uint32_t*>(own.weights + j / kFragmentRows * kWarp + q * 4 + j % 8 / 2);
        to[j / 8 % 2] = high;
        to[2 + j / 8 % 2] = low;
    }
    row_sum = warp_sum(row_sum);
    const float rescale = expf(before.x - row_max);
    __syncwarp();
    if (lane_id() == 0) own.softmax[q] = make_float3(row_max, before.y * rescale + row_sum, rescale);
}

// Rescales a warp's sums to the new row maximum, and adds the weighted values of a tile: 16 dimensions at a time, over
// every `groups`-th 16 positions from its own group on.
__device__ inline void add_values(float (&sum)[kWarpDims][4], const AttentionShared& own, int dims, int tiles,
                                  int group, int groups, int count) {
    const int lane = opaque(lane_id());
    const float first = own.softmax[lane % 4 * 2].z, second = own.softmax[lane % 4 * 2 + 1].z;
#pragma unroll
    for (int i = 0; i < kWarpDims; ++i)
        sum[i][0] *= first, sum[i][1] *= second, sum[i][2] *= first, sum[i][3] *= second;
    const int row = lane / 16 * 8 + lane % 8;
    const SharedAddress values = shared_address(own.values + row * own.pitch + (dims * 2 + lane / 8 % 2) * 16);
#pragma unroll 4
    for (int i = group; i < ceil_div(count, kFragmentRows); i += groups) {
        const Fragment weights = own.weights[i * kWarp + lane];
#pragma unroll
        for (int j = 0; j < kWarpDims; ++j) {
            if (dims + j * kBatchWarps >= tiles) continue;
            uint32_t rows[4];
            load_transposed(rows, values + i * kFragmentRows * own.pitch + j * kBatchWarps * 32);
            multiply_add(sum[j], rows, weights);
        }
    }
}

// Stores what a chunk gives for the tile of queries from `first` on: the sums of all groups of warps, and the softmax.
__device__ inline void store_chunk(const BatchChunk& chunk, const AttentionShared& own, int first, int groups) {
    const BatchStep& step = chunk.step;
    const int head_dim = step.shape.head_dim, tiles = head_dim / kTile, heads = step.shape.heads;
    const int queries = min(kTileQueries, step.group_size() - first);
    const size_t head =
        (static_cast<size_t>(chunk.index) * kMaxBatchChunks + chunk.begin / chunk.sequence.kv_chunk_size) * heads +
        chunk.kv_head * step.group_size() + first;
    for (int i = threadIdx.x; i < tiles * kWarp; i += kBatchThreads) {
        float4 sum = own.partial[i];
        for (int group = 1; group < groups; ++group) sum = sum + own.partial[group * tiles * kWarp + i];
        const int q = i % 4 * 2;
        float* const to = step.chunk_out + (head + q) * head_dim + i / kWarp * kTile + i % kWarp / 4;
        if (q < queries) __stcg(to, sum.x * kInputScale), __stcg(to + 8, sum.z * kInputScale);
        if (q + 1 < queries) __stcg(to + head_dim, sum.y * kInputScale), __stcg(to + head_dim + 8, sum.w * kInputScale);
    }
    const int q = static_cast<int>(threadIdx.x);
    if (q < queries) __stcg(step.softmax + head + q, make_float2(own.softmax[q].x, own.softmax[q].y));
}

// Attention over one chunk. Copying its first tile has already started.
__device__ inline void attend(const BatchChunk& chunk, const AttentionShared& own, const __half* bias,
                              const float2* rope) {
    static_assert(kBatchWarps == kTileQueries);  // for update_softmax()
    const int head_dim = chunk.step.shape.head_dim, tiles = head_dim / kTile, groups = max(1, kBatchWarps / tiles);
    const int group_size = chunk.step.group_size(), kv_tile = chunk.step.kv_tile_size;
    const int dims = tiles > kBatchWarps ? warp_id() : warp_id() % tiles;
    const int group = tiles > kBatchWarps ? 0 : warp_id() / tiles;
    load_token(chunk, own, bias, rope);
    const Fragment* queries = own.queries;
#pragma unroll 1
    for (int first = 0; first < group_size; first += kTileQueries, queries += head_dim / kFragmentRows * kWarp) {
        if (threadIdx.x < kTileQueries) own.softmax[threadIdx.x] = make_float3(-INFINITY, 0.0f, 0.0f);
        float sum[kWarpDims][4] = {};
#pragma unroll 1
        for (int tile = chunk.begin; tile < chunk.end; tile += kv_tile) {
            const int count = min(kv_tile, chunk.end - tile);
            if (tile > chunk.begin || (first > 0 && chunk.end - chunk.begin > kv_tile))
                chunk.copy_tile(own, tile, chunk.end);
            fill_up(chunk, own, count);
            copy_wait<0>();
            sync_batch();
            compute_scores(chunk, own, queries, count);
            sync_batch();
            update_softmax(chunk, own, group_size - first, count);
            sync_batch();
            if (group < groups) add_values(sum, own, dims, tiles, group, groups, count);
            if (tile + kv_tile < chunk.end) sync_batch();
        }
#pragma unroll
        for (int i = 0; i < kWarpDims; ++i)
            if (group < groups && dims + i * kBatchWarps < tiles)
                own.partial[(group * tiles + dims + i * kBatchWarps) * kWarp + lane_id()] =
                    make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
        sync_batch();
        store_chunk(chunk, own, first, groups);
        sync_batch();
    }
}

// Combines the chunks of a KV head's queries. What a thread needs of several chunks is read at once.
__device__ inline void merge_parts(const BatchChunk& chunk) {
    constexpr int kParts = 4;
    const BatchStep& step = chunk.step;
    const int group_size = step.group_size(), head_dim = step.shape.head_dim, heads = step.shape.heads;
    const int chunks = chunk.sequence.kv_chunks;
    const size_t head = static_cast<size_t>(chunk.index) * kMaxBatchChunks * heads + chunk.kv_head * group_size;
#pragma unroll 1
    for (int i = 4 * threadIdx.x; i < group_size * head_dim; i += 4 * kBatchThreads) {
        const float2* const softmax = step.softmax + head + i / head_dim;
        const float* const from = step.chunk_out + head * head_dim + i;
        float row_max = -INFINITY, row_sum = 0.0f;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (int begin = 0; begin < chunks; begin += kParts) {
            float4 part[kParts];
            float2 own[kParts];
            float next_max = row_max;
#pragma unroll
            for (int c = 0; c < kParts; ++c) {  // no branch: past the end, the last chunk has no weight
                const int index = min(begin + c, chunks - 1);
                part[c] = __ldcg(reinterpret_cast<const float4*>(from + static_cast<size_t>(index) * heads * head_dim));
                own[c] = __ldcg(softmax + index * heads);
            }
#pragma unroll
            for (int c = 0; c < kParts; ++c) next_max = fmaxf(next_max, own[c].x);
            const float rescale = expf(row_max - next_max);
            row_sum *= rescale;
            sum = make_float4(sum.x * rescale, sum.y * rescale, sum.z * rescale, sum.w * rescale);
#pragma unroll
            for (int c = 0; c < kParts; ++c) {
                const float w = begin + c < chunks ? expf(own[c].x - next_max) : 0.0f;
                row_sum += w * own[c].y;
                sum = sum + make_float4(w * part[c].x, w * part[c].y, w * part[c].z, w * part[c].w);
            }
            row_max = next_max;
        }
        const float scale = 1.0f / row_sum;
        float* const to = step.attn_out + chunk.index * step.attn_width() + chunk.kv_head * group_size * head_dim + i;
        __stcg(reinterpret_cast<float4*>(to), make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale));
    }
    sync_batch();
}

}  // namespace tango
