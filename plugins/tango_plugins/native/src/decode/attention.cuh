// Attention of one token over the KV cache, on tensor cores. The sequence is cut into chunks, and a block handles one
// chunk for the query heads of one KV head. Each of its warps takes 16 keys at a time, from scores to outputs, so warps
// wait for each other only where they start and where combine_warps() adds what they have. merge_chunks() combines the
// chunks.
#pragma once

#include <algorithm>

#include "step.cuh"

namespace tango {

constexpr int kQueries = 8;             // whose scores a warp computes together: half the rows of an `mma`
constexpr int kKeys = 16;               // of a warp, and dimensions of one `mma`
constexpr int kKvTileBytes = 36 << 10;  // shared memory for a tile of keys and one of values
constexpr int kParts = 4;               // chunks that a thread adds at a time
constexpr float kRestScale = 2048.0f;   // of what fp16 has lost
constexpr float kLog2E = 1.44269504f;   // scores are logarithms to the base 2

// Halves from one row of a tile to the next: eight rows that a warp reads together are in all banks.
__host__ __device__ constexpr int tile_pitch(int head_dim) { return head_dim + kVector; }

// Positions of a tile. Each kKeys of them have a warp.
inline int kv_tile_size(int head_dim) {
    const int fit = kKvTileBytes / (2 * tile_pitch(head_dim) * static_cast<int>(sizeof(__half)));
    return std::min(kMaxKvTile, fit / kKeys * kKeys);
}

// Floats of shared memory for the queries.
__host__ __device__ inline int query_floats(int group_size, int head_dim) {
    return ceil_div(group_size, kQueries) * kQueries * head_dim;
}

// Two numbers as fp16; `rest` is `scale` times what that has lost, so that nothing of fp32 is.
__device__ inline uint32_t split_halves(float a, float b, float scale, uint32_t& rest) {
    const __half2 high = __floats2half2_rn(a, b);
    const float2 rounded = __half22float2(high);
    rest = bits_of(__floats2half2_rn((a - rounded.x) * scale, (b - rounded.y) * scale));
    return bits_of(high);
}

// Cosines and sines of the token's rotary angles, which are the same in every layer.
__device__ inline void compute_rope(const Step& step, float2* rope) {
    for (int d = threadIdx.x; d < step.shape.head_dim / 2; d += kThreads) {
        float sine, cosine;
        sincosf(step.rotation * step.tensors.frequencies[d], &sine, &cosine);
        rope[d] = make_float2(cosine, sine);
    }
}

// What a block works on in attention: one chunk of one KV head.
struct Chunk {
    int kv_head, number;  // of its chunks
    int begin, end;       // positions [begin, end)
    int head_dim;
    __half *keys, *values;  // the KV head's rows of the cache
    __half *key_tile, *value_tile;

    __device__ Chunk(const Step& step, const Shared& shared, int layer, int index) {
        const auto& cache = shared.layers[layer % 2];
        head_dim = step.shape.head_dim;
        kv_head = index / step.kv_chunks;
        number = index - kv_head * step.kv_chunks;
        begin = number * step.kv_chunk_size;
        end = min(begin + step.kv_chunk_size, step.position + 1);
        const size_t offset = static_cast<size_t>(kv_head) * step.shape.capacity * head_dim;
        keys = static_cast<__half*>(cache.keys) + offset;
        values = static_cast<__half*>(cache.values) + offset;
        key_tile = shared.key_tile();
        value_tile = key_tile + step.kv_tile_size * tile_pitch(head_dim);
    }

    // Starts copying the first tile, except for the token's own row: load_token() adds it.
    __device__ void copy_first_tile(const Step& step) const { copy_tile(step, begin, min(end, step.position)); }

    // Starts copying the tile at a position to shared memory, up to position `until`. Zeros follow the chunk's last
    // value, up to a multiple of kKeys.
    __device__ void copy_tile(const Step& step, int tile, int until) const {
        const int shift = step.lanes_shift, part = (threadIdx.x & ((1 << shift) - 1)) * kVector;
        const int count = min(step.kv_tile_size, end - tile), padded = ceil_div(count, kKeys) * kKeys;
#pragma unroll 1
        for (int row = threadIdx.x >> shift; row < padded && part < head_dim; row += kThreads >> shift) {
            const int to = row * tile_pitch(head_dim) + part;
            const size_t from = static_cast<size_t>(tile + row) * head_dim + part;
            if (tile + row < until) {
                copy_async(shared_address(key_tile + to), keys + from);
                copy_async(shared_address(value_tile + to), values + from);
            } else if (row >= count) {
                *reinterpret_cast<uint4*>(value_tile + to) = make_uint4(0, 0, 0, 0);
            }
        }
        copy_commit();
    }
};

// Stores four dimensions of a query, from `d` on, as the left operand of `mma`, whose upper rows are queries and whose
// lower rows are what fp16 has lost of them. For each kKeys dimensions of kQueries queries, lane 4 s + t has query s's
// dimensions 2 t and 2 t + 1, their rests, dimensions 2 t + 8 and 2 t + 9, and their rests.
__device__ inline void store_query(float* queries, int head_dim, int query, int d, const float4& x, float scale) {
    const int lane = query % kQueries * 4 + d % kVector / 2, step = query / kQueries * (head_dim / kKeys) + d / kKeys;
    uint32_t* const to = reinterpret_cast<uint32_t*>(queries) + (step * kWarp + lane) * 4 + d % kKeys / kVector * 2;
    to[0] = split_halves(x.x * scale, x.y * scale, kRestScale, to[1]);
    to[4] = split_halves(x.z * scale, x.w * scale, kRestScale, to[5]);
}

// Four columns of query, key and value, with their bias.
__device__ inline float4 qkv_columns(const Step& step, const __half* bias, int column) {
    const uint2 four = *reinterpret_cast<const uint2*>(bias + column);
    const float2 low = __half22float2(half2_of(four.x)), high = __half22float2(half2_of(four.y));
    float4 sum = make_float4(low.x, low.y, high.x, high.y);
    add_splits(sum, step.qkv + column, step.partitions[kQkv].split_k, step.partitions[kQkv].columns);
    return sum;
}

// Rotates four dimensions `a` and those that are head_dim / 2 after them.
__device__ inline void rotate(float4& a, float4& b, const float2* rope) {
    const float4 x = a, y = b;
    a = make_float4(x.x * rope[0].x - y.x * rope[0].y, x.y * rope[1].x - y.y * rope[1].y,
                    x.z * rope[2].x - y.z * rope[2].y, x.w * rope[3].x - y.w * rope[3].y);
    b = make_float4(y.x * rope[0].x + x.x * rope[0].y, y.y * rope[1].x + x.y * rope[1].y,
                    y.z * rope[2].x + x.z * rope[2].y, y.w * rope[3].x + x.w * rope[3].y);
}

__device__ inline uint2 four_halves(const float4& x) {
    return make_uint2(bits_of(__floats2half2_rn(x.x, x.y)), bits_of(__floats2half2_rn(x.z, x.w)));
}

// Loads the queries, scaled. In the sequence's last chunk it also writes the token's key and value to the cache, and to
// the tile if they belong there.
__device__ inline void load_token(const Step& step, const Shared& shared, const Chunk& chunk, const __half* bias) {
    const int group_size = step.group_size, head_dim = chunk.head_dim, half = head_dim / 2;
    const int own = step.position - chunk.begin;  // the token's row
    const bool is_last = chunk.end == step.position + 1, in_tile = own < step.kv_tile_size;
    const int shift = step.lanes_shift, d = (threadIdx.x & ((1 << shift) - 1)) * 4;
    const float scale = rsqrtf(static_cast<float>(head_dim)) * kLog2E;
#pragma unroll 1
    for (int row = threadIdx.x >> shift; row < group_size + 2 * is_last && d < half; row += kThreads >> shift) {
        const int head = row < group_size    ? chunk.kv_head * group_size + row
                         : row == group_size ? step.shape.heads + chunk.kv_head
                                             : step.shape.heads + step.shape.kv_heads + chunk.kv_head;
        const int column = head * head_dim + d;
        float4 a = qkv_columns(step, bias, column), b = qkv_columns(step, bias, column + half);
        if (row <= group_size) rotate(a, b, shared.rope + d);
        if (row < group_size) {
            store_query(shared.queries(), head_dim, row, d, a, scale);
            store_query(shared.queries(), head_dim, row, half + d, b, scale);
            continue;
        }
        const auto store = [&](__half* to) {
            *reinterpret_cast<uint2*>(to + d) = four_halves(a);
            *reinterpret_cast<uint2*>(to + half + d) = four_halves(b);
        };
        const bool is_key = row == group_size;
        store((is_key ? chunk.keys : chunk.values) + static_cast<size_t>(step.position) * head_dim);
        if (in_tile) store((is_key ? chunk.key_tile : chunk.value_tile) + own * tile_pitch(head_dim));
    }
}

// What a warp has of the keys that it took of each tile, for kQueries queries. Lane 4 s + t has the row maximum of
// query s, and the row sum over its own keys. The outputs, weighted with exp2(score - row_max), are in shared memory
// [head_dim / kKeys, lanes] as `mma` has them: dimensions g and g + 8 of queries 2 t and 2 t + 1, for lane 4 g + t.
struct WarpAttention {
    float4* outputs;
    int head_dim;
    float row_max = -INFINITY, row_sum = 0.0f;

    // Adds kKeys keys and values of a tile, of which the first `count` count.
    __device__ void add(const uint4* queries, __half* keys, __half* values, int count) {
        const int lane = local_lane(), pitch = tile_pitch(head_dim);
        float scores[4];  // of keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9
        compute_scores(scores, queries, keys, pitch);
        const int key = lane % 4 * 2;
        float top = row_max;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (key + i / 2 * 8 + i % 2 >= count) scores[i] = -INFINITY;
            top = fmaxf(top, scores[i]);
        }
#pragma unroll
        for (int offset = 1; offset <= 2; offset *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, offset));
        const float factor = exp2_fast(row_max - top);
        row_max = top;
        row_sum *= factor;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            scores[i] = exp2_fast(scores[i] - top);
            row_sum += scores[i];
        }
        uint32_t right[2], rest[2];  // weights are at most 1, so the rest needs no scale
        right[0] = split_halves(scores[0], scores[1], 1.0f, rest[0]);
        right[1] = split_halves(scores[2], scores[3], 1.0f, rest[1]);
        const float2 rescale =
            make_float2(__shfl_sync(kAllLanes, factor, lane % 4 * 8), __shfl_sync(kAllLanes, factor, lane % 4 * 8 + 4));
        values += (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * kVector;
#pragma unroll 2
        for (int i = 0; i < head_dim / kKeys; ++i) {
            const float4 before = outputs[i * kWarp + lane];
            float sum[4] = {before.x * rescale.x, before.y * rescale.y, before.z * rescale.x, before.w * rescale.y};
            uint32_t left[4];
            load_transposed(left, shared_address(values + i * kKeys));
            mma(sum, left, right);
            mma(sum, left, rest);
            outputs[i * kWarp + lane] = make_float4(sum[0], sum[1], sum[2], sum[3]);
        }
    }

    // Scores of kKeys keys. An `mma` has eight of them.
    __device__ void compute_scores(float (&scores)[4], const uint4* queries, __half* keys, int pitch) const {
        const int lane = lane_id();
        float sums[2][4] = {};
        keys += (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * kVector;
#pragma unroll 4
        for (int i = 0; i < head_dim / kKeys; ++i) {
            const uint4 query = queries[i * kWarp + lane];
            const uint32_t left[4] = {query.x, query.y, query.z, query.w};
            uint32_t right[4];
            load_matrices(right, shared_address(keys + i * kKeys));
            mma(sums[0], left, {right[0], right[1]});
            mma(sums[1], left, {right[2], right[3]});
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[i] = sums[i / 2][i % 2] + sums[i / 2][i % 2 + 2] / kRestScale;
    }
};

// Adds what the warps have of a chunk, one slice of the dimensions in a warp.
__device__ inline void combine_warps(const Step& step, const Chunk& chunk, const float4* outputs, const float2* softmax,
                                     int sharers, int first) {
    const int head_dim = chunk.head_dim, slices = head_dim / kKeys, lane = lane_id(), slice = warp_id();
    const int head = chunk.number * step.shape.heads + chunk.kv_head * step.group_size + first;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int query = lane % 4 * 2 + i;
        float row_max = -INFINITY, row_sum = 0.0f;
#pragma unroll 1
        for (int w = 0; w < sharers; ++w) row_max = fmaxf(row_max, softmax[w * kQueries + query].x);
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 1
        for (int w = 0; w < sharers; ++w) {
            const float2 own = softmax[w * kQueries + query];
            const float4 part = outputs[(w * slices + slice) * kWarp + lane];
            const float weight = exp2_fast(own.x - row_max);
            row_sum += weight * own.y;
            sum = sum + make_float2(weight * (i == 0 ? part.x : part.y), weight * (i == 0 ? part.z : part.w));
        }
        if (first + query >= step.group_size) continue;
        float* const to = step.attn_out + static_cast<size_t>(head + query) * head_dim + slice * kKeys + lane / 4;
        __stcg(to, sum.x);
        __stcg(to + 8, sum.y);
        if (slice == 0 && lane < 4) __stcg(step.softmax + head + query, make_float2(row_max, row_sum));
    }
}

// Attention over one chunk. Copying its first tile has already started. A warp has every tile's next kKeys keys. The
// block goes over the chunk once for kQueries queries.
__device__ inline void attend(const Step& step, const Shared& shared, const Chunk& chunk, const __half* bias) {
    const int group_size = step.group_size, head_dim = chunk.head_dim, pitch = tile_pitch(head_dim);
    const int slices = head_dim / kKeys, lane = lane_id(), own = warp_id() * kKeys;
    const int sharers = ceil_div(min(step.kv_tile_size, chunk.end - chunk.begin), kKeys);
    float4* const outputs = reinterpret_cast<float4*>(shared.outputs());
    float2* const softmax = reinterpret_cast<float2*>(outputs + sharers * slices * kWarp);  // [sharers, kQueries]
    load_token(step, shared, chunk, bias);
#pragma unroll 1
    for (int first = 0; first < group_size; first += kQueries) {
        WarpAttention warp = {outputs + warp_id() * slices * kWarp, head_dim};
        if (warp_id() < sharers)
            for (int i = lane; i < slices * kWarp; i += kWarp) warp.outputs[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const uint4* const queries =
            reinterpret_cast<const uint4*>(shared.queries()) + first / kQueries * slices * kWarp;
#pragma unroll 1
        for (int tile = chunk.begin; tile < chunk.end; tile += step.kv_tile_size) {
            if (first > 0 || tile > chunk.begin) {
                sync_threads();  // all warps have read the tile before, or all outputs
                chunk.copy_tile(step, tile, chunk.end);
            }
            copy_wait<0>();
            sync_threads();
            const int count = min(step.kv_tile_size, chunk.end - tile) - own;
            if (count > 0) warp.add(queries, chunk.key_tile + own * pitch, chunk.value_tile + own * pitch, count);
        }
#pragma unroll
        for (int offset = 1; offset <= 2; offset *= 2) warp.row_sum += __shfl_xor_sync(kAllLanes, warp.row_sum, offset);
        if (warp_id() < sharers && lane % 4 == 0)
            softmax[warp_id() * kQueries + lane / 4] = make_float2(warp.row_max, warp.row_sum);
        sync_threads();
        if (warp_id() >= slices) continue;
        combine_warps(step, chunk, outputs, softmax, sharers, first);
    }
    sync_threads();
}

// A chunk's weight in attention's output, for all chunks of heads [first, end): the share of its exponentials, so that
// its values, weighted with those, only have to be multiplied with it. `weights` [heads, kv_chunks].
__device__ inline void weigh_chunks(const Step& step, float2* weights, int first, int end) {
    const int heads = step.shape.heads, chunks = step.kv_chunks;
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
            weight[c].x = exp2_fast(weight[c].x - row_max);
            row_sum += weight[c].x * weight[c].y;
        }
        const float inverse = 1.0f / warp_sum(row_sum);
#pragma unroll 1
        for (int c = lane_id(); c < chunks; c += kWarp) weight[c].x *= inverse;
    }
}

// Combines the chunks to attention's output, for rows [row, row + rows) of it. `weights` has room for [heads,
// kv_chunks], and `sums` for a float4 of each thread. A thread adds every `groups`-th chunk of four rows.
__device__ inline void merge_chunks(const Step& step, float* input, float2* weights, float4* sums, int row, int rows) {
    if (rows == 0) return;
    const int chunks = step.kv_chunks, stride = step.shape.heads * step.shape.head_dim / 4, columns = rows / 4;
    const int width = step.merged_columns.value, groups = step.merge_groups;
    const int group = step.merged_columns.divide(threadIdx.x), own = threadIdx.x - group * width;
#pragma unroll 1
    for (int first = 0; first < columns; first += width) {
        const int column = first + own, begin = group < groups && column < columns ? group : chunks;
        const float4* const from = reinterpret_cast<const float4*>(step.attn_out + row) + column;
        float4 part[kParts], sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        clear(part);
        const auto load = [&](int chunk) {
#pragma unroll
            for (int i = 0; i < kParts; ++i)
                if (chunk + i * groups < chunks) part[i] = __ldcg(from + (chunk + i * groups) * stride);
        };
        load(begin);  // in flight while the weights are computed
        const float2* const weight = weights + step.head_dim.divide(row + 4 * column) * chunks;
        if (first == 0) {
            weigh_chunks(step, weights, step.head_dim.divide(row), step.head_dim.divide(row + rows - 1) + 1);
            sync_threads();
        }
#pragma unroll 1
        for (int chunk = begin; chunk < chunks; chunk += kParts * groups) {
            if (chunk > begin) load(chunk);
#pragma unroll
            for (int i = 0; i < kParts; ++i) {
                if (chunk + i * groups >= chunks) continue;
                const float w = weight[chunk + i * groups].x;
                sum = sum + make_float4(w * part[i].x, w * part[i].y, w * part[i].z, w * part[i].w);
            }
        }
        sums[threadIdx.x] = sum;
        sync_threads();
        if (own == static_cast<int>(threadIdx.x) && column < columns) {
#pragma unroll 2
            for (int i = threadIdx.x + width; i < width * groups; i += width) sum = sum + sums[i];
            reinterpret_cast<float4*>(input)[column] = sum;
        }
        sync_threads();
    }
}

}  // namespace tango
