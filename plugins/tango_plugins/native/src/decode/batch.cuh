// What the phases of a batched decode step share: the kernel's argument, and a block's shared memory.
#pragma once

#include "attention.cuh"
#include "batch_gemv.cuh"

namespace tango {

constexpr int kMaxBatchSplitK = 8;
constexpr int kBatchChunkSize = 256;  // positions of a chunk of attention, unless these are too many chunks
constexpr int kMaxBatchChunks = 64;
constexpr int kBatchHeaderBytes = 1024;
constexpr int kMinRingBytes = 98 << 10;  // for weights and sums, beside the input; or for keys and values

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
    GemvPartition partitions[kGemvs];
    BatchSequence sequences[kSequences];
    int count;                  // of sequences
    int attention_parts;        // of all sequences
    int kv_tile_size;           // positions of a chunk that are in shared memory at a time
    int lanes_per_key;          // a power of two
    int shared_bytes;           // of a block
    unsigned* arrived_blocks;   // counts the blocks that end a phase, over all phases
    unsigned* finished_blocks;  // counts the blocks that end the step
    unsigned* arrived_parts;    // counts the parts of each result that are there
    float* residual;            // [sequences, hidden_size], the residual stream
    float* squares;             // [tiles, 2, sequences]: of the residual stream, for half of a tile's columns
    Fragment* normed;           // [hidden_size], the input of a GEMV: the residual stream times a norm's weights
    float* qkv;                 // [sequences, splits, columns of kQkv]
    float* chunk_out;           // [sequences, chunks, heads, head_dim], values weighted with exp(score - row_max)
    float2* softmax;            // [sequences, chunks, heads]: row_max, row_sum
    Fragment* attn_out;         // [heads, head_dim], the input of kOut
    float* residual_delta;      // [splits of kOut or kDown, sequences, hidden_size]
    Fragment* hidden;           // [intermediate], the input of kDown

    __host__ __device__ int group_size() const { return shape.heads / shape.kv_heads; }
    __host__ __device__ int attn_width() const { return shape.heads * shape.head_dim; }
};

// The shared memory of a block. What is behind its header is used in turns: by a GEMV for its input, and after it for
// its ring and sums, and by attention.
struct BatchShared {
    TangoDecodeLayer* layers;   // [2], this layer and the next
    GemvPartition* partitions;  // [kGemvs]
    TangoMatrix* head;
    uint16_t* places;  // [kOrders, kUnit], see place_of()
    float* scales;     // [sequences], of a GEMV's results
    Phase* phase;      // in registers it would be spilled
    int* is_last;      // see all_arrived()
    float2* rope;      // [sequences, head_dim / 2]: cosine, sine
    Fragment* input;   // of a GEMV, the rows that the block needs

    __host__ __device__ BatchShared(const BatchStep& step, float4* memory) {
        layers = reinterpret_cast<TangoDecodeLayer*>(memory);
        head = reinterpret_cast<TangoMatrix*>(layers + 2);
        partitions = reinterpret_cast<GemvPartition*>(head + 1);
        scales = reinterpret_cast<float*>(partitions + kGemvs);
        phase = reinterpret_cast<Phase*>(scales + kSequences);
        is_last = reinterpret_cast<int*>(phase + 1);
        places = reinterpret_cast<uint16_t*>(is_last + 1);
        rope = reinterpret_cast<float2*>(reinterpret_cast<char*>(memory) + kBatchHeaderBytes);
        input = reinterpret_cast<Fragment*>(rope + kSequences * step.shape.head_dim / 2);
    }

    // The ring of a GEMV.
    __device__ Ring ring(const BatchStep& step, const GemvPartition& partition) const {
        uint4* const begin = input + ceil_div(partition.split_rows, kInputRows) * kInputRows / kFragmentRows * kWarp;
        char* const end = reinterpret_cast<char*>(layers) + step.shared_bytes;
        return {begin, static_cast<int>(end - reinterpret_cast<char*>(begin))};
    }

    // Those of an order.
    __device__ const uint16_t* places_of(const TangoMatrix& weights) const {
        return places + order_of(weights) * kUnit;
    }

    // The matrix of a GEMV, or the first of two.
    __device__ const TangoMatrix& matrix(int layer, int gemv) const {
        return gemv == kLmHead ? *head : *(&layers[layer % 2].qkv + gemv);
    }
};
static_assert(2 * sizeof(TangoDecodeLayer) + sizeof(TangoMatrix) + kGemvs * sizeof(GemvPartition) +
                      kSequences * sizeof(float) + sizeof(Phase) + sizeof(int) + kOrders * kUnit * sizeof(uint16_t) <=
                  kBatchHeaderBytes,
              "the header is too small");

// What attention.cuh takes for the step of one sequence.
struct SequenceStep {
    TangoDecodeShape shape;
    const GemvPartition* partitions;
    int position, kv_chunks, kv_chunk_size, kv_tile_size, lanes_per_key, group_size;
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
        lanes_per_key = step.lanes_per_key;
        group_size = step.group_size();
        const GemvPartition& gemv = step.partitions[kQkv];
        qkv = step.qkv + static_cast<size_t>(sequence) * gemv.split_k * gemv.columns;
        const size_t chunk_heads = static_cast<size_t>(sequence) * kMaxBatchChunks * shape.heads;
        attn_out = step.chunk_out + chunk_heads * shape.head_dim;
        softmax = step.softmax + chunk_heads;
    }
};

// And for the shared memory of a block.
struct SequenceShared {
    const TangoDecodeCache* layers;  // [2], at `layer` % 2 that of the layer
    const float2* rope;
    float* scores;         // [group_size, kMaxKvTile], then the softmax weights
    float* chunk_weights;  // [group_size, kMaxBatchChunks]
    float3* softmax;       // [group_size]

    __host__ __device__ SequenceShared(const BatchStep& step, const BatchShared& shared)
        : layers(nullptr), rope(nullptr), partial_outputs_(reinterpret_cast<float*>(shared.input)) {
        const int group_size = step.group_size();
        scores = partial_outputs_ + kAccumulatorFloats;
        chunk_weights = scores + group_size * kMaxKvTile;
        queries_ = chunk_weights + group_size * kMaxBatchChunks;
        softmax = reinterpret_cast<float3*>(queries_ + group_size * step.lanes_per_key * kVector);
        key_tile_ = reinterpret_cast<__half*>(softmax + ceil_div(group_size, 4) * 4);
    }

    __device__ float* queries() const { return queries_; }
    __device__ float* partial_outputs() const { return partial_outputs_; }
    __host__ __device__ __half* key_tile() const { return key_tile_; }
    template <typename AnyStep>
    __device__ __half* value_tile(const AnyStep& step) const {
        return key_tile_ + step.kv_tile_size * step.shape.head_dim;
    }

  private:
    float *partial_outputs_, *queries_;
    __half* key_tile_;
};

}  // namespace tango
