// What the phases of a step of decoding share: what it is told, a block's shared memory, and how blocks wait for each
// other.
#pragma once

#include "product.cuh"
#include "tango/decode.h"

namespace tango {

constexpr int kMostSlices = 4;
constexpr int kMostTile = 128;             // most positions whose scores are in shared memory at a time
constexpr int kHeaderFloats = 128;         // shared memory for what describes the work
constexpr int kRingBytes = kLoads * kThreads * static_cast<int>(sizeof(uint4));

// The products of a layer in their order, and the last one.
enum { kQkv, kOut, kMlp, kDown, kHead, kProducts };

// Everything that a step is told; the kernel's only argument.
struct Step {
    TangoDecodeShape shape;
    TangoDecodeTensors tensors;
    Share share[kProducts];
    int position;
    int chunks, chunk;   // attention: parts of the sequence, and positions of one
    int tile;            // positions that are in shared memory at a time
    int lanes;           // that read a row of the cache, a power of two
    int input_floats;    // shared memory for the input of a product
    unsigned* arrived;   // blocks that have ended a phase, all phases together
    unsigned* finished;  // blocks that have ended the step
    float* packed;       // [slices of qkv, columns of qkv]
    float* mixed;        // [chunks, heads, head_width], values weighed by exp(score - greatest score)
    float2* weight;      // [chunks, heads]: greatest score, sum of the weights
    float* branch;       // [slices of out or down, width]: what is added to the residual
    float* hidden;       // [intermediate]
};

// The shared memory of a block.
struct Shared {
    TangoDecodeLayer* layers;  // [2], this layer and the next
    Share* share;              // [kProducts]
    float* residual;           // [width], the stream that all layers add to
    float* input;              // of a product, the rows that the block takes; in attention, the queries
    float* sums;               // [kSumFloats]
    uint4* ring;               // of a product; in attention, a tile of keys and one of values
    float* norm;               // [width], the weights of the next norm
    float* scores;             // [queries of a head of the cache, kMostTile], then their weights
    float2* rotation;          // [head_width / 2], cosine and sine
    float3* state;             // [queries]: greatest score, sum of weights, what those of earlier tiles are multiplied by

    __host__ __device__ Shared(const Step& step, float4* memory) {
        const int group = step.shape.heads / step.shape.kv_heads;
        layers = reinterpret_cast<TangoDecodeLayer*>(memory);
        share = reinterpret_cast<Share*>(layers + 2);
        residual = reinterpret_cast<float*>(memory) + kHeaderFloats;
        input = residual + step.shape.width;
        sums = input + step.input_floats;
        ring = reinterpret_cast<uint4*>(sums + kSumFloats);
        norm = reinterpret_cast<float*>(ring + kLoads * kThreads);
        scores = norm + step.shape.width;
        rotation = reinterpret_cast<float2*>(scores + group * kMostTile);
        state = reinterpret_cast<float3*>(rotation + step.shape.head_width / 2);
    }
};
static_assert(2 * sizeof(TangoDecodeLayer) + kProducts * sizeof(Share) <= kHeaderFloats * sizeof(float), "no room");

// What the last warp does: for every phase, tell that this block has ended it, and wait for the others.
__device__ inline void keep_in_step(unsigned* arrived, int phases) {
    for (unsigned target = gridDim.x; phases > 0; --phases, target += gridDim.x) {
        barrier::gather();
        if (lane_id() == 0) {
            __threadfence();
            atomicAdd(arrived, 1u);
            while (barrier::load_acquire(arrived) < target) {
            }
        }
        __syncwarp();
        barrier::wait();
    }
}

__device__ inline float4 operator+(const float4& a, const float4& b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Sums over the slices of a product, [slices, step] where `from` is in the first: all are read at once.
template <typename T>
__device__ void add_slices(T& total, const float* from, int slices, int step) {
    T part[kMostSlices];
#pragma unroll
    for (int s = 0; s < kMostSlices; ++s)
        if (s < slices) part[s] = __ldcg(reinterpret_cast<const T*>(from + s * step));
#pragma unroll
    for (int s = 0; s < kMostSlices; ++s)
        if (s < slices) total = total + part[s];
}

// Copies to shared memory without waiting; it has come when the next product has run.
template <typename T>
__device__ void copy_ahead(T* to, const T* from, int count) {
    const int bytes = count * static_cast<int>(sizeof(T));
#pragma unroll 1
    for (int i = 16 * threadIdx.x; i < bytes; i += 16 * kThreads)
        copy_async(shared_address(to) + i, reinterpret_cast<const char*>(from) + i);
    copy_commit();
}

}  // namespace tango
