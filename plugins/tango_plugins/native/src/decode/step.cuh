// What the phases of a decode step share: the kernel's argument, and a block's shared memory.
#pragma once

#include "block_gemv.cuh"
#include "common/rank.cuh"
#include "fp8_gemv.cuh"
#include "registers.cuh"
#include "tango/decode.h"

namespace tango {

constexpr int kMaxSplitK = 4;
constexpr int kMaxKvTile = 128;    // largest number of positions of a tile
constexpr int kHeaderBytes = 768;  // shared memory for the layers and partitions
constexpr int kRingBytes = kLoads * kThreads * static_cast<int>(sizeof(uint4));

constexpr int kChunkWeights = kAccumulatorFloats / 2 - 2 * kThreads;  // besides a float4 of each thread

// The GEMVs of a layer in their order, which is that of their matrices in TangoDecodeLayer, and the last one.
enum { kQkv, kOut, kGateUp, kDown, kLmHead, kGemvs };

// Where a block's shared memory has what, in bytes from its beginning; see Shared.
struct SharedLayout {
    int residual, input, accumulators, ring, ring_bytes, norm, rope, bytes;
};

// The kernel's only argument.
struct Step {
    TangoDecodeShape shape;
    TangoDecodeTensors tensors;
    GemvPartition partitions[kGemvs];
    SharedLayout layout;
    int group_size;  // query heads of a KV head
    Divisor head_dim;
    Divisor merged_columns;        // float4 of the input of kOut that the threads merge at a time
    int merge_groups;              // of threads that have different chunks then
    int position, rotation;        // of the token: row in the cache, and position of its rotary angles
    int kv_chunks, kv_chunk_size;  // attention: parts that the sequence is cut into, and positions of one
    int kv_tile_size;              // positions of a chunk that are in shared memory at a time
    int lanes_shift;               // of the lanes that copy a key, a power of two, its logarithm
    unsigned* arrived_blocks;      // counts the blocks that end a phase, over all phases
    unsigned* finished_blocks;     // counts the blocks that end the step
    unsigned* stopped;             // whether the token, received in front of the step, ends the sequence; or null
    Rank* best;                    // of the logits of the blocks that have ended the step
    float* qkv;                    // [splits of kQkv, columns of kQkv]
    float* attn_out;               // [kv_chunks, heads, head_dim], values weighted with exp(score - row_max)
    float2* softmax;               // [kv_chunks, heads]: row_max, row_sum
    float* residual_delta;         // [splits of kOut or kDown, hidden_size], to be added to the residual stream
    float* hidden;                 // [intermediate]
};

// The shared memory of a block.
struct Shared {
    TangoDecodeLayer* layers;   // [2], this layer and the next
    GemvPartition* partitions;  // [kGemvs]
    float* residual;            // [hidden_size], the residual stream in fp32; every block has a copy
    float* input;               // of a GEMV, the rows that the block needs
    float* accumulators;        // [kAccumulatorFloats]
    Ring ring;                  // of a GEMV
    float* norm;                // [hidden_size], weights of the next norm
    float2* rope;               // [head_dim / 2]: cosine, sine

    __device__ Shared(const SharedLayout& layout, float4* memory) {
        char* const from = reinterpret_cast<char*>(memory);
        layers = reinterpret_cast<TangoDecodeLayer*>(from);
        partitions = reinterpret_cast<GemvPartition*>(head() + 1);
        residual = reinterpret_cast<float*>(from + layout.residual);
        input = reinterpret_cast<float*>(from + layout.input);
        accumulators = reinterpret_cast<float*>(from + layout.accumulators);
        ring = {reinterpret_cast<uint4*>(from + layout.ring), layout.ring_bytes};
        norm = reinterpret_cast<float*>(from + layout.norm);
        rope = reinterpret_cast<float2*>(from + layout.rope);
    }

    __device__ TangoMatrix* head() const { return reinterpret_cast<TangoMatrix*>(layers + 2); }

    // The matrix of a GEMV, or the first of two.
    __device__ const TangoMatrix& matrix(int layer, int gemv) const {
        return gemv == kLmHead ? *head() : *(&layers[layer % 2].qkv + gemv);
    }

    // Between two GEMVs, attention uses the memory of their inputs and rings.
    __device__ float* queries() const { return input; }         // see store_query()
    __device__ float* outputs() const { return accumulators; }  // of the warps, and their row maxima and sums
    __device__ __half* key_tile() const {
        return reinterpret_cast<__half*>(ring.memory);
    }  // [kv_tile_size], values too

    // While a GEMV's input is prepared, its accumulators are free.
    __device__ float2* chunk_weights() const { return reinterpret_cast<float2*>(accumulators); }  // [heads, kv_chunks]
    __device__ float4* chunk_sums() const { return reinterpret_cast<float4*>(accumulators + 2 * kChunkWeights); }
    __device__ float* warp_sums() const { return accumulators; }  // [kWarps]

    // After the last GEMV, all of it is.
    __device__ Rank* warp_ranks() const { return reinterpret_cast<Rank*>(accumulators); }  // [kWarps]
};
static_assert(2 * sizeof(TangoDecodeLayer) + kGemvs * sizeof(GemvPartition) + sizeof(TangoMatrix) <= kHeaderBytes,
              "layers, partitions and the head do not fit into the header");

__device__ inline float2 operator+(const float2& a, const float2& b) { return make_float2(a.x + b.x, a.y + b.y); }

__device__ inline float4 operator+(const float4& a, const float4& b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Adds the results of all splits of a GEMV. They are `stride` apart, `from` is in the first; all are read at once.
template <typename T>
__device__ void add_splits(T& sum, const float* from, int splits, int stride) {
    T part[kMaxSplitK];
    clear(part);
#pragma unroll
    for (int s = 0; s < kMaxSplitK; ++s)
        if (s < splits) part[s] = __ldcg(reinterpret_cast<const T*>(from + s * stride));
#pragma unroll
    for (int s = 0; s < kMaxSplitK; ++s)
        if (s < splits) sum = sum + part[s];
}

// Starts a copy to shared memory. It has arrived when the next Gemv::run() returns.
template <typename T>
__device__ void copy_ahead(T* to, const T* from, int count) {
    const int bytes = count * static_cast<int>(sizeof(T));
#pragma unroll 1
    for (int i = 16 * threadIdx.x; i < bytes; i += 16 * kThreads)
        copy_async(shared_address(to) + i, reinterpret_cast<const char*>(from) + i);
    copy_commit();
}

}  // namespace tango
