// What the phases of a batched decode step share: the kernel's argument, and a block's shared memory.
#pragma once

#include "attention.cuh"
#include "batch_gemv.cuh"

namespace tango {

constexpr int kMaxBatchSplitK = 8;
constexpr int kBatchChunkSize = 256;  // positions of a chunk of attention, unless these are too many chunks
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
    int kv_tile_size;           // positions of a chunk that are in shared memory at a time
    int lanes_shift;            // of the lanes that copy a key, a power of two, its logarithm
    int input_bytes;            // shared memory for the input of a GEMV, or for attention
    unsigned* arrived_blocks;   // counts the blocks that end a phase, over all phases
    unsigned* finished_blocks;  // counts the blocks that end the step
    unsigned* arrived_parts;    // counts the parts of each result that are there
    float* residual;            // [sequences, hidden_size], the residual stream
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
    float* scales;    // [sequences], of a norm
    int* is_last;     // see all_arrived()
    float2* rope;     // [sequences, head_dim / 2]: cosine, sine
    Fragment* input;  // of a GEMV, the rows that the block needs
    char* ring;       // of a GEMV, then its sums
    char* end;

    __host__ __device__ BatchShared(const BatchStep& step, float4* memory) {
        layers = reinterpret_cast<TangoDecodeLayer*>(memory);
        head = reinterpret_cast<TangoMatrix*>(layers + 2);
        partitions = reinterpret_cast<BatchPartition*>(head + 1);
        scales = reinterpret_cast<float*>(partitions + kGemvs);
        is_last = reinterpret_cast<int*>(scales + kSequences);
        rope = reinterpret_cast<float2*>(reinterpret_cast<char*>(memory) + kBatchHeaderBytes);
        input = reinterpret_cast<Fragment*>(rope + kSequences * step.shape.head_dim / 2);
        ring = reinterpret_cast<char*>(input) + step.input_bytes;
        end = ring + kBatchRingBytes;
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

// What attention.cuh takes for the step of one sequence.
struct SequenceStep {
    TangoDecodeShape shape;
    const BatchPartition* partitions;
    int position, kv_chunks, kv_chunk_size, kv_tile_size, lanes_shift, group_size;
    const float* qkv;
    float* attn_out;
    float2* softmax;

    __device__ SequenceStep(const BatchStep& step, int sequence) : shape(step.shape), partitions(step.partitions) {
        const BatchSequence& own = step.sequences[sequence];
        shape.capacity = own.capacity;
        position = own.position;
        kv_chunks = own.kv_chunks;
        kv_chunk_size = own.kv_chunk_size;
        kv_tile_size = step.kv_tile_size;
        lanes_shift = step.lanes_shift;
        group_size = step.group_size();
        const BatchPartition& gemv = step.partitions[kQkv];
        qkv = step.qkv + static_cast<size_t>(sequence) * gemv.split_k * gemv.columns;
        const size_t chunk_heads = static_cast<size_t>(sequence) * kMaxBatchChunks * shape.heads;
        attn_out = step.chunk_out + chunk_heads * shape.head_dim;
        softmax = step.softmax + chunk_heads;
    }
};

// And for the shared memory of a block: it uses that of a GEMV's input, and of its ring.
struct SequenceShared {
    const TangoDecodeCache* layers;  // [2], at `layer` % 2 that of the layer
    const float2* rope;
    float* chunk_weights;  // [group_size, kMaxBatchChunks]

    __host__ __device__ SequenceShared(const BatchStep& step, const BatchShared& shared)
        : layers(nullptr), rope(nullptr), input_(reinterpret_cast<float*>(shared.input)), ring_(shared.ring) {
        chunk_weights = input_ + kAccumulatorFloats;
        queries_ = chunk_weights + step.group_size() * kMaxBatchChunks;
        end_ = queries_ + query_floats(step.group_size(), step.shape.head_dim);
    }

    __device__ float* queries() const { return queries_; }
    __device__ float* outputs() const { return input_; }
    __device__ __half* key_tile() const { return reinterpret_cast<__half*>(ring_); }

    __host__ int input_bytes() const { return static_cast<int>(reinterpret_cast<char*>(end_) - reinterpret_cast<char*>(input_)); }

  private:
    float *input_, *queries_, *end_;
    char* ring_;
};

}  // namespace tango
