// Attention of one token over the cache: the sequence is cut into chunks, and a block has the queries of one head of the
// cache and one chunk. What comes of it is put together in combine().
#pragma once

#include "step.cuh"

namespace tango {

constexpr int kQueries = 8;  // whose scores a warp sums at a time
constexpr int kParts = 4;    // of the chunks that a thread adds up at a time

// A column of query, key and value.
__device__ inline float packed_column(const Step& step, const __half* bias, int column) {
    float total = __half2float(bias[column]);
    add_slices(total, step.packed + column, step.share[kQkv].slices, step.share[kQkv].columns);
    return total;
}

// Cosines and sines of the rotary angles of the token: it has the same position in every layer.
__device__ inline void tabulate(const Step& step, float2* rotation) {
    for (int d = threadIdx.x; d < step.shape.head_width / 2; d += kThreads) {
        float sine, cosine;
        sincosf(step.position * step.tensors.frequencies[d], &sine, &cosine);
        rotation[d] = make_float2(cosine, sine);
    }
}

// Columns `first` and `first` + half a head, rotated by the angle of dimension `d`.
__device__ inline float2 rotated(const Step& step, const Shared& shared, const __half* bias, int first, int d) {
    const float a = packed_column(step, bias, first);
    const float b = packed_column(step, bias, first + step.shape.head_width / 2);
    const float2 by = shared.rotation[d];
    return make_float2(a * by.x - b * by.y, b * by.x + a * by.y);
}

// What attention of one head of the cache over one chunk works on.
struct Attention {
    int head, begin, end;  // the chunk's positions
    int width;             // of a head
    __half *keys, *values; // the head's rows of the cache
    __half *key_tile, *value_tile;

    __device__ Attention(const Step& step, const Shared& shared, int l, int index) {
        const TangoDecodeLayer& layer = shared.layers[l % 2];
        width = step.shape.head_width;
        head = index / step.chunks;
        begin = (index - head * step.chunks) * step.chunk;
        end = min(begin + step.chunk, step.position + 1);
        const size_t slab = static_cast<size_t>(head) * step.shape.capacity * width;
        keys = static_cast<__half*>(layer.keys) + slab;
        values = static_cast<__half*>(layer.values) + slab;
        key_tile = reinterpret_cast<__half*>(shared.ring);
        value_tile = key_tile + step.tile * width;
    }

    // All rows of the first tile but the token's own, which is to come.
    __device__ void copy_first_tile(const Step& step) const { copy_tile(step, begin, min(end, step.position)); }

    // Begins to copy a tile of the chunk, up to a position, to shared memory.
    __device__ void copy_tile(const Step& step, int tile, int until) const {
        const int count = (min(tile + step.tile, until) - tile) * width;
        const size_t from = static_cast<size_t>(tile) * width;
        copy_ahead(key_tile, keys + from, count);
        copy_ahead(value_tile, values + from, count);
    }
};

// Where dimension `d` of a query is in shared memory: what the lanes read at a time lies side by side.
__device__ inline int place_of(const Step& step, int query, int d) {
    const int quad = d % kVector / 4;
    return ((query * (kVector / 4) + quad) * step.lanes + d / kVector) * 4 + d % 4;
}

// The queries, scaled, and in the sequence's last chunk the token's own key and value: to the cache, and to the tile if
// that is where they belong.
__device__ inline void load_token(const Step& step, const Shared& shared, const Attention& at, const __half* bias) {
    const TangoDecodeShape& shape = step.shape;
    const int group = shape.heads / shape.kv_heads, width = at.width, half = width / 2;
    const int key = (shape.heads + at.head) * width, value = key + shape.kv_heads * width;
    const bool last = at.end == step.position + 1, here = step.position - at.begin < step.tile;
    const size_t row = static_cast<size_t>(step.position) * width;
    const int in_tile = (step.position - at.begin) * width;
    const float scale = rsqrtf(static_cast<float>(width));
#pragma unroll 1
    for (int i = threadIdx.x; i < (group + last) * half; i += kThreads) {
        const int q = i / half, d = i - q * half;
        const float2 pair = rotated(step, shared, bias, q < group ? (at.head * group + q) * width + d : key + d, d);
        if (q < group) {
            shared.input[place_of(step, q, d)] = pair.x * scale;
            shared.input[place_of(step, q, half + d)] = pair.y * scale;
            continue;
        }
        const __half first = __float2half(pair.x), second = __float2half(pair.y);
        at.keys[row + d] = first;
        at.keys[row + half + d] = second;
        if (!here) continue;
        at.key_tile[in_tile + d] = first;
        at.key_tile[in_tile + half + d] = second;
    }
    if (!last) return;
#pragma unroll 1
    for (int d = kThreads - 1 - threadIdx.x; d < width; d += kThreads) {  // threads that have no pair
        const __half rounded = __float2half(packed_column(step, bias, value + d));
        at.values[row + d] = rounded;
        if (here) at.value_tile[in_tile + d] = rounded;
    }
}

// Scores of the keys [count, width] of a tile: a key is read by a few lanes of a warp, a power of two of them.
__device__ inline void score(const Step& step, const Shared& shared, const __half* keys, int count) {
    const int group = step.shape.heads / step.shape.kv_heads, width = step.shape.head_width, lanes = step.lanes;
    const int sub = lane_id() % lanes, at_once = kWarp / lanes;
    const bool inside = sub * kVector < width;
    const float4* queries = reinterpret_cast<const float4*>(shared.input) + sub;
#pragma unroll 1
    for (int base = warp_id() * at_once; base < count; base += kWarps * at_once) {
        const int j = base + lane_id() / lanes;
        float key[kVector] = {};
        if (inside && j < count) multiply_add(key, reinterpret_cast<const uint4*>(keys + j * width)[sub], 1.0f);
#pragma unroll 1
        for (int first = 0; first < group; first += kQueries) {
            float sum[kQueries];
#pragma unroll
            for (int q = 0; q < kQueries; ++q) {  // without a branch: the last query stands in for those past the end
                const float4* query = queries + min(first + q, group - 1) * (kVector / 4) * lanes;
                const float4 a = query[0], b = query[lanes];
                const float low = key[0] * a.x + key[1] * a.y + key[2] * a.z + key[3] * a.w;
                const float high = key[4] * b.x + key[5] * b.y + key[6] * b.z + key[7] * b.w;
                sum[q] = inside ? low + high : 0.0f;
            }
#pragma unroll 1
            for (int offset = lanes / 2; offset > 0; offset /= 2)
#pragma unroll
                for (int q = 0; q < kQueries; ++q) sum[q] += __shfl_xor_sync(kAllLanes, sum[q], offset);
#pragma unroll
            for (int q = 0; q < kQueries; ++q)
                if (sub == 0 && j < count && first + q < group) shared.scores[(first + q) * kMostTile + j] = sum[q];
        }
    }
}

// Scores → weights relative to the greatest score so far.
__device__ inline void weigh(const Shared& shared, int count, int group) {
#pragma unroll 1
    for (int q = warp_id(); q < group; q += kWarps) {
        float* scores = shared.scores + q * kMostTile;
        float greatest = -INFINITY, total = 0.0f;
#pragma unroll 1
        for (int j = lane_id(); j < count; j += kWarp) greatest = fmaxf(greatest, scores[j]);
        const float3 before = shared.state[q];
        greatest = fmaxf(before.x, warp_max(greatest));
#pragma unroll 1
        for (int j = lane_id(); j < count; j += kWarp) {
            scores[j] = expf(scores[j] - greatest);
            total += scores[j];
        }
        total = warp_sum(total);
        const float kept = expf(before.x - greatest);
        __syncwarp();
        if (lane_id() == 0) shared.state[q] = make_float3(greatest, before.y * kept + total, kept);
    }
}

// Attention of the queries of one head of the cache over one chunk. The first tile has been begun to be copied.
__device__ inline void attend(const Step& step, const Shared& shared, const Attention& at, const __half* bias) {
    const TangoDecodeShape& shape = step.shape;
    const int group = shape.heads / shape.kv_heads, width = at.width;
    load_token(step, shared, at, bias);
#pragma unroll 1
    for (int q = threadIdx.x; q < group; q += kThreads) shared.state[q] = make_float3(-INFINITY, 0.0f, 0.0f);

    // Each thread has 8 dimensions of one query, and every so-manieth position.
    const int outputs = group * width, vectors = outputs / kVector, parts = kThreads / vectors;
    const int part = threadIdx.x / vectors, vector = threadIdx.x - part * vectors, q = vector * kVector / width;
    const __half* from = at.value_tile + (vector * kVector - q * width);
    const float* weights = shared.scores + q * kMostTile;
    float sum[kVector] = {};
#pragma unroll 1
    for (int tile = at.begin; tile < at.end; tile += step.tile) {
        const int count = min(step.tile, at.end - tile);
        if (tile > at.begin) at.copy_tile(step, tile, at.end);
        copy_wait<0>();
        sync_threads();
        score(step, shared, at.key_tile, count);
        sync_threads();
        weigh(shared, count, group);
        sync_threads();
        if (part < parts) {
#pragma unroll
            for (int i = 0; i < kVector; ++i) sum[i] *= shared.state[q].z;
#pragma unroll 4
            for (int j = part; j < count; j += parts)
                multiply_add(sum, *reinterpret_cast<const uint4*>(from + j * width), weights[j]);
        }
        sync_threads();
    }
    if (part < parts) {
        float4* to = reinterpret_cast<float4*>(shared.sums + part * outputs + vector * kVector);
        to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
        to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
    }
    sync_threads();
    const int heads = at.begin / step.chunk * shape.heads + at.head * group;
#pragma unroll 1
    for (int i = threadIdx.x; i < outputs; i += kThreads) {
        float total = 0.0f;
#pragma unroll 8
        for (int p = 0; p < parts; ++p) total += shared.sums[p * outputs + i];
        __stcg(step.mixed + static_cast<size_t>(heads) * width + i, total);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < group; i += kThreads)
        __stcg(step.weight + heads + i, make_float2(shared.state[i].x, shared.state[i].y));
    sync_threads();
}

// Chunks → attention's output, some rows of it; `factors` is [heads, chunks], room for two numbers each.
__device__ inline void combine(const Step& step, float* input, float2* factors, int row, int rows) {
    const int heads = step.shape.heads, width = step.shape.head_width, chunks = step.chunks;
    const int first = row / width, end = ceil_div(row + rows, width), r = 4 * threadIdx.x;
    const float* mixed = step.mixed + row + r;
    float4 part[kParts];  // under way while the factors are computed
#pragma unroll
    for (int c = 0; c < kParts; ++c)
        if (r < rows && c < chunks) part[c] = __ldcg(reinterpret_cast<const float4*>(mixed + c * heads * width));
#pragma unroll 1
    for (int h = first + warp_id(); h < end; h += kWarps) {
        float2* factor = factors + h * chunks;
        float greatest = -INFINITY, total = 0.0f;
#pragma unroll 1
        for (int c = lane_id(); c < chunks; c += kWarp) {
            factor[c] = __ldcg(step.weight + c * heads + h);
            greatest = fmaxf(greatest, factor[c].x);
        }
        greatest = warp_max(greatest);
#pragma unroll 1
        for (int c = lane_id(); c < chunks; c += kWarp) {
            factor[c].x = expf(factor[c].x - greatest);
            total += factor[c].x * factor[c].y;
        }
        total = warp_sum(total);
#pragma unroll 1
        for (int c = lane_id(); c < chunks; c += kWarp) factor[c].x /= total;
    }
    sync_threads();
#pragma unroll 1
    for (int i = r; i < rows; i += 4 * kThreads) {
        const float2* factor = factors + (row + i) / width * chunks;
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (int begin = 0; begin < chunks; begin += kParts) {
#pragma unroll
            for (int c = 0; c < kParts; ++c)
                if (begin + c < chunks && begin + i > r)  // the first were read above
                    part[c] = __ldcg(reinterpret_cast<const float4*>(mixed + i - r + (begin + c) * heads * width));
#pragma unroll
            for (int c = 0; c < kParts; ++c) {
                if (begin + c >= chunks) continue;
                const float f = factor[begin + c].x;
                total = total + make_float4(f * part[c].x, f * part[c].y, f * part[c].z, f * part[c].w);
            }
        }
        *reinterpret_cast<float4*>(input + i) = total;
    }
    sync_threads();
}

}  // namespace tango
