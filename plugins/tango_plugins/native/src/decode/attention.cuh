// Attention of one token over the KV cache. The sequence is cut into chunks, and a block handles one chunk for the
// query heads of one KV head. merge_chunks() combines the chunks.
//
// Up to attend(), the step and the shared memory are those of step.cuh, or what a batch has of one sequence
// (batch.cuh).
#pragma once

#include "step.cuh"

namespace tango {

constexpr int kQueries = 8;  // queries whose scores a warp reduces at a time
constexpr int kParts = 4;    // chunks that a thread adds at a time

// A column of query, key and value, with its bias.
template <typename AnyStep>
__device__ float qkv_column(const AnyStep& step, const __half* bias, int column) {
    float sum = __half2float(bias[column]);
    add_splits(sum, step.qkv + column, step.partitions[kQkv].split_k, step.partitions[kQkv].columns);
    return sum;
}

// Cosines and sines of the token's rotary angles, which are the same in every layer.
__device__ inline void compute_rope(const Step& step, float2* rope) {
    for (int d = threadIdx.x; d < step.shape.head_dim / 2; d += kThreads) {
        float sine, cosine;
        sincosf(step.rotation * step.tensors.frequencies[d], &sine, &cosine);
        rope[d] = make_float2(cosine, sine);
    }
}

// Columns `first` and `first` + head_dim / 2, rotated by the angle of dimension `d`.
template <typename AnyStep, typename AnyShared>
__device__ float2 rotated(const AnyStep& step, const AnyShared& shared, const __half* bias, int first, int d) {
    const float a = qkv_column(step, bias, first);
    const float b = qkv_column(step, bias, first + step.shape.head_dim / 2);
    const float2 rope = shared.rope[d];
    return make_float2(a * rope.x - b * rope.y, b * rope.x + a * rope.y);
}

// What a block works on in attention: one chunk of one KV head.
struct Chunk {
    int kv_head, begin, end;  // positions [begin, end)
    int head_dim;
    __half *keys, *values;  // the KV head's rows of the cache
    __half *key_tile, *value_tile;

    template <typename AnyStep, typename AnyShared>
    __device__ Chunk(const AnyStep& step, const AnyShared& shared, int layer, int index) {
        const auto& cache = shared.layers[layer % 2];
        head_dim = step.shape.head_dim;
        kv_head = index / step.kv_chunks;
        begin = (index - kv_head * step.kv_chunks) * step.kv_chunk_size;
        end = min(begin + step.kv_chunk_size, step.position + 1);
        const size_t offset = static_cast<size_t>(kv_head) * step.shape.capacity * head_dim;
        keys = static_cast<__half*>(cache.keys) + offset;
        values = static_cast<__half*>(cache.values) + offset;
        key_tile = shared.key_tile();
        value_tile = shared.value_tile(step);
    }

    // Starts copying the first tile, except for the token's own row: load_token() adds it.
    template <typename AnyStep>
    __device__ void copy_first_tile(const AnyStep& step) const {
        copy_tile(step, begin, min(end, step.position));
    }

    // Starts copying the tile at a position to shared memory, up to position `until`.
    template <typename AnyStep>
    __device__ void copy_tile(const AnyStep& step, int tile, int until) const {
        const int count = (min(tile + step.kv_tile_size, until) - tile) * head_dim;
        const size_t from = static_cast<size_t>(tile) * head_dim;
        copy_ahead(key_tile, keys + from, count);
        copy_ahead(value_tile, values + from, count);
    }
};

// Offset of dimension `d` of a query in shared memory: what the lanes of a key read together is contiguous.
template <typename AnyStep>
__device__ int query_offset(const AnyStep& step, int query, int d) {
    const int quad = d % kVector / 4;
    return ((query * (kVector / 4) + quad) * step.lanes_per_key + d / kVector) * 4 + d % 4;
}

// Loads the queries, scaled. In the sequence's last chunk it also writes the token's key and value to the cache, and to
// the tile if they belong there.
template <typename AnyStep, typename AnyShared>
__device__ void load_token(const AnyStep& step, const AnyShared& shared, const Chunk& chunk, const __half* bias) {
    const TangoDecodeShape& shape = step.shape;
    const int group_size = step.group_size, head_dim = chunk.head_dim, half = head_dim / 2;
    const int key = (shape.heads + chunk.kv_head) * head_dim, value = key + shape.kv_heads * head_dim;
    const bool is_last = chunk.end == step.position + 1, in_tile = step.position - chunk.begin < step.kv_tile_size;
    const size_t row = static_cast<size_t>(step.position) * head_dim;
    const int tile_row = (step.position - chunk.begin) * head_dim;
    const float scale = rsqrtf(static_cast<float>(head_dim));
#pragma unroll 1
    for (int i = threadIdx.x; i < (group_size + is_last) * half; i += kThreads) {
        const int q = i / half, d = i - q * half;
        const int column = q < group_size ? (chunk.kv_head * group_size + q) * head_dim + d : key + d;
        const float2 pair = rotated(step, shared, bias, column, d);
        if (q < group_size) {
            shared.queries()[query_offset(step, q, d)] = pair.x * scale;
            shared.queries()[query_offset(step, q, half + d)] = pair.y * scale;
            continue;
        }
        const __half first = __float2half(pair.x), second = __float2half(pair.y);
        chunk.keys[row + d] = first;
        chunk.keys[row + half + d] = second;
        if (!in_tile) continue;
        chunk.key_tile[tile_row + d] = first;
        chunk.key_tile[tile_row + half + d] = second;
    }
    if (!is_last) return;
#pragma unroll 1
    for (int d = kThreads - 1 - threadIdx.x; d < head_dim; d += kThreads) {  // threads that rotated no pair come first
        const __half rounded = __float2half(qkv_column(step, bias, value + d));
        chunk.values[row + d] = rounded;
        if (in_tile) chunk.value_tile[tile_row + d] = rounded;
    }
}

// Scores of the keys [count, head_dim] of a tile. A few lanes of a warp, a power of two, share a key.
template <typename AnyStep, typename AnyShared>
__device__ void compute_qk(const AnyStep& step, const AnyShared& shared, const __half* keys, int count) {
    const int group_size = step.group_size, head_dim = step.shape.head_dim, lanes = step.lanes_per_key;
    const int sub = lane_id() % lanes, keys_per_warp = kWarp / lanes;
    const bool inside = sub * kVector < head_dim;
    const float4* queries = reinterpret_cast<const float4*>(shared.queries()) + sub;
#pragma unroll 1
    for (int base = warp_id() * keys_per_warp; base < count; base += kWarps * keys_per_warp) {
        const int j = base + lane_id() / lanes;
        float key[kVector] = {};
        if (inside && j < count) multiply_add(key, reinterpret_cast<const uint4*>(keys + j * head_dim)[sub], 1.0f);
#pragma unroll 1
        for (int first = 0; first < group_size; first += kQueries) {
            float score[kQueries];
#pragma unroll
            for (int q = 0; q < kQueries; ++q) {  // no branch: past the end, the last query is computed again
                const float4* query = queries + min(first + q, group_size - 1) * (kVector / 4) * lanes;
                const float4 a = query[0], b = query[lanes];
                const float low = key[0] * a.x + key[1] * a.y + key[2] * a.z + key[3] * a.w;
                const float high = key[4] * b.x + key[5] * b.y + key[6] * b.z + key[7] * b.w;
                score[q] = inside ? low + high : 0.0f;
            }
#pragma unroll 1
            for (int offset = lanes / 2; offset > 0; offset /= 2)
#pragma unroll
                for (int q = 0; q < kQueries; ++q) score[q] += __shfl_xor_sync(kAllLanes, score[q], offset);
#pragma unroll
            for (int q = 0; q < kQueries; ++q)
                if (sub == 0 && j < count && first + q < group_size)
                    shared.scores[(first + q) * kMaxKvTile + j] = score[q];
        }
    }
}

// Turns the scores of a tile into weights relative to the new row maximum.
template <typename AnyShared>
__device__ void update_softmax(const AnyShared& shared, int count, int group_size) {
#pragma unroll 1
    for (int q = warp_id(); q < group_size; q += kWarps) {
        float* scores = shared.scores + q * kMaxKvTile;
        float row_max = -INFINITY, row_sum = 0.0f;
#pragma unroll 1
        for (int j = lane_id(); j < count; j += kWarp) row_max = fmaxf(row_max, scores[j]);
        const float3 before = shared.softmax[q];
        row_max = fmaxf(before.x, warp_max(row_max));
#pragma unroll 1
        for (int j = lane_id(); j < count; j += kWarp) {
            scores[j] = expf(scores[j] - row_max);
            row_sum += scores[j];
        }
        row_sum = warp_sum(row_sum);
        const float rescale = expf(before.x - row_max);
        __syncwarp();
        if (lane_id() == 0) shared.softmax[q] = make_float3(row_max, before.y * rescale + row_sum, rescale);
    }
}

// Rescales a thread's sum to the new row maximum, and adds the weighted values of a tile: 8 dimensions of one query
// head, over every `parts`-th position from `part` on.
__device__ inline void accumulate_pv(float (&sum)[kVector], float rescale, const __half* values, const float* weights,
                                     int head_dim, int part, int parts, int count) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[i] *= rescale;
#pragma unroll 4
    for (int j = part; j < count; j += parts)
        multiply_add(sum, *reinterpret_cast<const uint4*>(values + j * head_dim), weights[j]);
}

// Attention over one chunk. Copying its first tile has already started.
template <typename AnyStep, typename AnyShared>
__device__ void attend(const AnyStep& step, const AnyShared& shared, const Chunk& chunk, const __half* bias) {
    const int group_size = step.group_size, head_dim = chunk.head_dim;
    load_token(step, shared, chunk, bias);
#pragma unroll 1
    for (int q = threadIdx.x; q < group_size; q += kThreads) shared.softmax[q] = make_float3(-INFINITY, 0.0f, 0.0f);

    const int outputs = group_size * head_dim, vectors = outputs / kVector, parts = kThreads / vectors;
    const int part = threadIdx.x / vectors, vector = threadIdx.x - part * vectors, q = vector * kVector / head_dim;
    const __half* values = chunk.value_tile + (vector * kVector - q * head_dim);
    const float* weights = shared.scores + q * kMaxKvTile;
    float sum[kVector] = {};
#pragma unroll 1
    for (int tile = chunk.begin; tile < chunk.end; tile += step.kv_tile_size) {
        const int count = min(step.kv_tile_size, chunk.end - tile);
        if (tile > chunk.begin) chunk.copy_tile(step, tile, chunk.end);
        copy_wait<0>();
        sync_threads();
        compute_qk(step, shared, chunk.key_tile, count);
        sync_threads();
        update_softmax(shared, count, group_size);
        sync_threads();
        if (part < parts) accumulate_pv(sum, shared.softmax[q].z, values, weights, head_dim, part, parts, count);
        sync_threads();
    }
    if (part < parts) {
        float4* to = reinterpret_cast<float4*>(shared.partial_outputs() + part * outputs + vector * kVector);
        to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
        to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
    }
    sync_threads();
    const int head = chunk.begin / step.kv_chunk_size * step.shape.heads + chunk.kv_head * group_size;
#pragma unroll 1
    for (int i = threadIdx.x; i < outputs; i += kThreads) {
        float output = 0.0f;
#pragma unroll 8
        for (int p = 0; p < parts; ++p) output += shared.partial_outputs()[p * outputs + i];
        __stcg(step.attn_out + static_cast<size_t>(head) * head_dim + i, output);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < group_size; i += kThreads)
        __stcg(step.softmax + head + i, make_float2(shared.softmax[i].x, shared.softmax[i].y));
    sync_threads();
}

// Combines the chunks to attention's output, for rows [row, row + rows) of it. `weights` has room for [heads,
// kv_chunks].
__device__ inline void merge_chunks(const Step& step, float* input, float2* weights, int row, int rows) {
    const int heads = step.shape.heads, head_dim = step.shape.head_dim, chunks = step.kv_chunks;
    const int first = row / head_dim, end = ceil_div(row + rows, head_dim), r = 4 * threadIdx.x;
    const float* attn_out = step.attn_out + row + r;
    float4 part[kParts];  // loads that are in flight while the weights are computed
#pragma unroll
    for (int c = 0; c < kParts; ++c)
        if (r < rows && c < chunks) part[c] = __ldcg(reinterpret_cast<const float4*>(attn_out + c * heads * head_dim));
#pragma unroll 1
    for (int h = first + warp_id(); h < end; h += kWarps) {
        float2* weight = weights + h * chunks;
        float row_max = -INFINITY, row_sum = 0.0f;
#pragma unroll 1
        for (int c = lane_id(); c < chunks; c += kWarp) {
            weight[c] = __ldcg(step.softmax + c * heads + h);
            row_max = fmaxf(row_max, weight[c].x);
        }
        row_max = warp_max(row_max);
#pragma unroll 1
        for (int c = lane_id(); c < chunks; c += kWarp) {
            weight[c].x = expf(weight[c].x - row_max);
            row_sum += weight[c].x * weight[c].y;
        }
        row_sum = warp_sum(row_sum);
#pragma unroll 1
        for (int c = lane_id(); c < chunks; c += kWarp) weight[c].x /= row_sum;
    }
    sync_threads();
#pragma unroll 1
    for (int i = r; i < rows; i += 4 * kThreads) {
        const float2* weight = weights + (row + i) / head_dim * chunks;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (int begin = 0; begin < chunks; begin += kParts) {
#pragma unroll
            for (int c = 0; c < kParts; ++c)
                if (begin + c < chunks && begin + i > r)  // the first ones were loaded above
                    part[c] =
                        __ldcg(reinterpret_cast<const float4*>(attn_out + i - r + (begin + c) * heads * head_dim));
#pragma unroll
            for (int c = 0; c < kParts; ++c) {
                if (begin + c >= chunks) continue;
                const float w = weight[begin + c].x;
                sum = sum + make_float4(w * part[c].x, w * part[c].y, w * part[c].z, w * part[c].w);
            }
        }
        *reinterpret_cast<float4*>(input + i) = sum;
    }
    sync_threads();
}

}  // namespace tango
