// What the phases of a batched decode step share: the kernel's argument, and a block's shared memory.
#pragma once

#include <type_traits>

#include "batch_gemv.cuh"

namespace tango {

constexpr int kMaxBatchSplitK = 8;
constexpr int kBatchChunkSize = 192;  // positions of a chunk of attention, unless these are too many chunks
constexpr int kMaxBatchKvTile = 256;
constexpr int kTileQueries = 8;  // columns of an `mma`
constexpr int kMaxBatchChunks = 64;
constexpr int kBatchHeaderBytes = 1024;

// One sequence of a step.
struct BatchSequence {
    const TangoDecodeCache* caches;  // [layers]
    const __half* embedding;
    float* logits;
    int capacity, position, rotation;  // as in TangoDecodeSequence
    int kv_chunks, kv_chunk_size;
    int first_part;  // of attention, over all sequences: a part is a chunk of one KV head
};

// The kernel's only argument. Arrays over sequences have room for kSequences.
struct BatchStep {
    TangoDecodeShape shape;
    TangoDecodeTensors tensors;
    BatchPartition partitions[kGemvs];
    BatchSequence sequences[kSequences];
    int count;                  // of sequences
    int attention_parts;        // of all sequences
    int kv_tile_size;           // positions of a chunk that are in shared memory at a time, a multiple of 32
    int input_bytes;            // shared memory for the input of a GEMV or for attention, of all
    int shared_bytes;           // of a block
    unsigned* arrived_blocks;   // counts the blocks that end a phase, over all phases
    unsigned* finished_blocks;  // counts the blocks that end the step
    unsigned* arrived_parts;    // counts the parts of each result that are there
    float2* rope;               // [sequences, head_dim / 2]: cosine, sine
    float* residual;            // [sequences, hidden_size], the residual stream
    float* normed;              // [sequences, hidden_size], it times the weights of the next norm
    float* squares;             // [tiles, sequences]: sums of the squares of a tile's columns of the residual stream
    float* qkv;                 // [sequences, splits, columns of kQkv]
    float* chunk_out;           // [sequences, chunks, heads, head_dim], values weighted with exp(score - row_max)
    float2* softmax;            // [sequences, chunks, heads]: row_max, row_sum
    float* attn_out;            // [sequences, heads, head_dim]
    float* residual_delta;      // [splits of kOut or kDown, sequences, hidden_size]
    float* hidden;              // [sequences, intermediate]

    __host__ __device__ int group_size() const { return shape.heads / shape.kv_heads; }
    __host__ __device__ int attn_width() const { return shape.heads * shape.head_dim; }
};

// The shared memory of a block.
struct BatchShared {
    TangoDecodeLayer* layers;    // [2], this layer and the next
    BatchPartition* partitions;  // [kGemvs]
    TangoMatrix* head;
    float* scales;  // [sequences], see BatchInput
    int* is_last;   // see all_arrived()
    char* input;    // of a GEMV, the rows that the block needs, with a ring of all that is left behind them
    char* end;      // of the least that there must be

    __host__ __device__ BatchShared(const BatchStep& step, float4* memory) {
        layers = reinterpret_cast<TangoDecodeLayer*>(memory);
        head = reinterpret_cast<TangoMatrix*>(layers + 2);
        partitions = reinterpret_cast<BatchPartition*>(head + 1);
        scales = reinterpret_cast<float*>(partitions + kGemvs);
        is_last = reinterpret_cast<int*>(scales + kSequences);
        input = reinterpret_cast<char*>(memory) + kBatchHeaderBytes;
        end = input + step.input_bytes + kBatchRingBytes;
    }

    // The input of a GEMV, and the ring of its weights.
    __device__ BatchInput input_of(const BatchPartition& gemv) const {
        Fragment* const fragments = reinterpret_cast<Fragment*>(input);
        const int units = input_units(gemv.split_rows);
        return {fragments, reinterpret_cast<float*>(fragments + units * (kUnit / kFragmentRows) * kWarp), scales};
    }
    __device__ Ring ring_of(const BatchPartition& gemv, int bytes) const {
        char* const from = input + input_units(gemv.split_rows) * kUnitInputBytes;
        return {reinterpret_cast<uint4*>(from), bytes - static_cast<int>(from - reinterpret_cast<char*>(layers))};
    }

    // The matrix of a GEMV, or the first of two.
    __device__ const TangoMatrix& matrix(int layer, int gemv) const {
        return gemv == kLmHead ? *head : *(&layers[layer % 2].qkv + gemv);
    }
};
static_assert(2 * sizeof(TangoDecodeLayer) + sizeof(TangoMatrix) + kGemvs * sizeof(BatchPartition) +
                      kSequences * sizeof(float) + sizeof(int) <=
                  kBatchHeaderBytes,
              "the header is too small");

}  // namespace tango
