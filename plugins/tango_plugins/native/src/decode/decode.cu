// A decode step as one kernel (tango/decode.h). Its blocks, one per SM, go through the phases together. Between two
// phases all blocks wait for each other, and results pass through the L2 cache. The GEMV of each phase starts loading
// its weights before that wait.
//
//   phase      input of the GEMV                        GEMV        output
//
//   kQkv       norm(residual += residual_delta)         qkv         qkv
//   attention                                                       attn_out, softmax      of each chunk
//   kOut       merge_chunks(attn_out, softmax)          out         residual_delta
//   kGateUp    norm(residual += residual_delta)         gate, up    hidden = silu(gate) up
//   kDown      hidden                                   down        residual_delta
//   (these five for each layer, then)
//   kLmHead    norm(residual += residual_delta)         lm_head     logits
//
// Every block has its own copy of the residual stream, in fp32, and adds the same deltas to it.
#include <algorithm>
#include <climits>
#include <type_traits>

#include "attention.cuh"
#include "common/check.h"
#include "common/device.h"
#include "mail.cuh"
#include "shape.h"

namespace tango {
namespace {

constexpr int kMinChunkSize = 64;    // fewer positions are not worth a block of their own
constexpr int kTypicalChunks = 12;   // of a sequence, assumed where the splits are chosen
constexpr int kMaxSplitRows = 8192;  // the input of a split must fit into shared memory
constexpr int kSplitCost = 64;       // sectors that can be read in the time of adding one more split
constexpr int kSectorBytes = kSector * sizeof(__half);
constexpr size_t kAlignment = 256;

static_assert(kDimMultiple == kSector);

// The GEMV at an index of the sequence of all GEMVs.
struct Phase {
    int layer, gemv;

    __device__ Phase(int index, int layers)
        : layer(index / kLmHead), gemv(layer < layers ? index % kLmHead : kLmHead) {}
};

// The greatest of the block's own logits, for its first thread.
__device__ Rank find_best(const Step& step, const Shared& shared) {
    const GemvPartition& head = shared.partitions[kLmHead];
    sync_threads();  // the logits are there
    Rank best = 0;
#pragma unroll 1
    for (int tile = blockIdx.x; tile < head.tiles; tile += gridDim.x) {
        const int begin = tile * head.tile_n, end = min(begin + head.tile_n, step.shape.vocabulary);
#pragma unroll 4
        for (int i = begin + threadIdx.x; i < end; i += kThreads)
            best = max(best, rank_of(__ldcg(step.tensors.logits + i), i));
    }
    best = warp_max_rank(best);
    if (lane_id() == 0) shared.warp_ranks()[warp_id()] = best;
    sync_threads();
#pragma unroll
    for (int i = 0; i < kWarps; ++i) best = max(best, shared.warp_ranks()[i]);
    return best;
}

// The last block to finish says which logit is the greatest, and resets the counters for the next step.
__device__ void finish(const Step& step, const Shared& shared) {
    TangoArgmax* const to = step.tensors.best;
    const Rank own = to == nullptr ? 0 : find_best(step, shared);
    if (threadIdx.x != 0) return;
    if (to != nullptr) {
        atomicMax(step.best, own);
        __threadfence();
    }
    if (atomicAdd(step.finished_blocks, 1u) != gridDim.x - 1) return;
    if (to != nullptr) {
        __threadfence();
        const int index = index_of(atomicExch(step.best, Rank{0}));
        *to = {index, __ldcg(step.tensors.logits + index)};
    }
    *step.arrived_blocks = 0;
    *step.finished_blocks = 0;
}

__device__ float block_sum(float value, float* warp_sums) {
    value = warp_sum(value);
    if (lane_id() == 0) warp_sums[warp_id()] = value;
    sync_threads();
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < kWarps / 4; ++i) sum = sum + reinterpret_cast<const float4*>(warp_sums)[i];
    return sum.x + sum.y + (sum.z + sum.w);
}

// residual += residual_delta; input = RMSNorm(residual).
__device__ void normalize(const Step& step, int splits, const Shared& shared) {
    const int hidden_size = step.shape.hidden_size;
    float squares = 0.0f;
#pragma unroll 2
    for (int i = 4 * threadIdx.x; i < hidden_size; i += 4 * kThreads) {
        float4 x = *reinterpret_cast<float4*>(shared.residual + i);
        add_splits(x, step.residual_delta + i, splits, hidden_size);
        *reinterpret_cast<float4*>(shared.residual + i) = x;
        squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    }
    const float scale = rsqrtf(block_sum(squares, shared.warp_sums()) / hidden_size + step.shape.norm_eps);
#pragma unroll 1
    for (int i = 4 * threadIdx.x; i < hidden_size; i += 4 * kThreads) {
        const float4 x = *reinterpret_cast<const float4*>(shared.residual + i);
        const float4 w = *reinterpret_cast<const float4*>(shared.norm + i);
        *reinterpret_cast<float4*>(shared.input + i) =
            make_float4(x.x * scale * w.x, x.y * scale * w.y, x.z * scale * w.z, x.w * scale * w.w);
    }
    sync_threads();
}

__device__ void load_hidden(const Step& step, float* input, int row, int rows) {
#pragma unroll 4
    for (int r = 4 * threadIdx.x; r < rows; r += 4 * kThreads)
        *reinterpret_cast<float4*>(input + r) = __ldcg(reinterpret_cast<const float4*>(step.hidden + row + r));
    sync_threads();
}

__device__ float silu(float x) { return x / (1.0f + expf(-x)); }

// Starts copies that depend on no other block, for later phases.
__device__ void copy_for_later(const Step& step, const Shared& shared, const Phase& phase) {
    const TangoDecodeLayer& weights = shared.layers[phase.layer % 2];
    const TangoDecodeLayer& next_weights = shared.layers[(phase.layer + 1) % 2];
    const bool is_last = phase.layer + 1 == step.shape.layers;
    if (phase.gemv == kOut) copy_ahead(shared.norm, weights.mlp_norm, step.shape.hidden_size);
    if (phase.gemv == kGateUp && !is_last)
        copy_ahead(&shared.layers[(phase.layer + 1) % 2], step.tensors.layers + phase.layer + 1, 1);
    if (phase.gemv == kDown)
        copy_ahead(shared.norm, is_last ? step.tensors.norm : next_weights.attention_norm, step.shape.hidden_size);
}

// Prepares the input of a GEMV in shared memory; returns the part that the block needs.
__device__ const float* load_input(const Step& step, const Shared& shared, const Phase& phase, const GemvPart& gemv) {
    if (phase.gemv == kOut) {
        merge_chunks(step, shared.input, shared.chunk_weights(), shared.chunk_sums(), gemv.row(), gemv.rows());
        return shared.input;
    }
    if (phase.gemv == kDown) {
        load_hidden(step, shared.input, gemv.row(), gemv.rows());
        return shared.input;
    }
    const bool is_first = phase.layer == 0 && phase.gemv == kQkv;  // nothing has been added to the embedding
    normalize(step, is_first ? 0 : shared.partitions[phase.gemv == kGateUp ? kOut : kDown].split_k, shared);
    return shared.input + gemv.row();
}

// Attention between kQkv and kOut: the blocks share all chunks of all KV heads.
__device__ void attention(const Step& step, const Shared& shared, int layer) {
    const int chunks = step.shape.kv_heads * step.kv_chunks;
    const __half* bias = static_cast<const __half*>(shared.layers[layer % 2].qkv_bias);
    for (int i = 16 * threadIdx.x; i < step.partitions[kQkv].columns; i += 16 * kThreads) prefetch_l2(bias + i);
    Chunk chunk(step, shared, layer, blockIdx.x);
    if (static_cast<int>(blockIdx.x) < chunks) chunk.copy_first_tile(step);
    DecodeBarrier::wait();
#pragma unroll 1
    for (int i = blockIdx.x; i < chunks; i += gridDim.x) {
        if (i != static_cast<int>(blockIdx.x)) {
            chunk = Chunk(step, shared, layer, i);
            chunk.copy_first_tile(step);
        }
        attend(step, shared, chunk, bias);
    }
    DecodeBarrier::arrive();
}

// Calls use(gemv) with the GEMV of a phase.
template <int kFormats, typename Use>
__device__ void with_gemv(const GemvPart& part, const Shared& shared, const TangoMatrix& first,
                          const TangoMatrix& second, Use use) {
    if (kFormats == TANGO_DECODE_FP16 || first.weights == TANGO_WEIGHTS_FP16)
        use(RowGemv<__half>(part, shared.ring, first, second));
    else if (first.weights == TANGO_WEIGHTS_INT8)
        use(RowGemv<int8_t>(part, shared.ring, first, second));
    else if (first.weights == TANGO_WEIGHTS_BLOCKS_4)
        use(BlockGemv<4>(part, shared.ring, first, second));
    else if (first.weights == TANGO_WEIGHTS_BLOCKS_8)
        use(BlockGemv<8>(part, shared.ring, first, second));
    else
        use(Fp8Gemv(part, shared.ring, first, second));
}

template <int kFormats>
__global__ void __launch_bounds__(kBlock, 1) decode(const Step step) {
    if (step.stopped != nullptr && __ldcg(step.stopped) != 0) return;
    const TangoDecodeShape& shape = step.shape;
    const Shared shared(step.layout, shared_memory());
    if (threadIdx.x >= kThreads) {
        DecodeBarrier::run(step.arrived_blocks, (kLmHead + 1) * shape.layers);
        return;
    }
    const __half* embedding = static_cast<const __half*>(step.tensors.embedding);
    for (int i = threadIdx.x; i < shape.hidden_size; i += kThreads) shared.residual[i] = __half2float(embedding[i]);
    compute_rope(step, shared.rope);
    if (threadIdx.x < kGemvs) shared.partitions[threadIdx.x] = step.partitions[threadIdx.x];
    if (threadIdx.x == 0) *shared.head() = step.tensors.head;
    copy_ahead(shared.layers, step.tensors.layers, 1);
    copy_wait<0>();
    sync_threads();
    copy_ahead(shared.norm, shared.layers[0].attention_norm, shape.hidden_size);
    copy_wait<0>();
    sync_threads();
    // One loop over all GEMVs: with the five phases of a layer written out, the code would not fit the instruction
    // cache. Of the formats of weights, a step mostly runs one.
#pragma unroll 1
    for (int index = 0; index <= kLmHead * shape.layers; ++index) {
        const Phase phase(index, shape.layers);
        if (phase.gemv == kOut) attention(step, shared, phase.layer);
        copy_for_later(step, shared, phase);
        const GemvPart part(shared.partitions[phase.gemv]);
        const TangoMatrix &first = shared.matrix(phase.layer, phase.gemv), &second = shared.layers[phase.layer % 2].up;
        const auto ready_input = [&] {
            if (index > 0) DecodeBarrier::wait();
            return load_input(step, shared, phase, part);
        };
        float* to = phase.gemv == kQkv ? step.qkv : phase.gemv == kLmHead ? step.tensors.logits : step.residual_delta;
        const int columns = phase.gemv == kLmHead ? shape.vocabulary : shared.partitions[phase.gemv].columns;
        const auto emit = [&](int column, int split, float sum, float up) {
            if (phase.gemv == kGateUp)
                __stcg(step.hidden + column, silu(sum) * up);
            else if (column < columns)
                __stcg(to + split * columns + column, sum);
        };
        if constexpr (kFormats == TANGO_DECODE_BLOCKS_4 && kKeepsPlace) {
            BlockGemv<4> gemv(part, shared.ring, first, second);
            gemv.start();
            gemv.run(ready_input(), shared.accumulators, emit);
        } else {
            constexpr int kFound = kFormats == TANGO_DECODE_FP16 ? kFormats : TANGO_DECODE_MIXED;
            with_gemv<kFound>(part, shared, first, second, [](auto gemv) { gemv.start(); });
            const float* const input = ready_input();
            with_gemv<kFound>(part, shared, first, second, [&](auto gemv) {
                gemv.skip_started();
                gemv.run(input, shared.accumulators, emit);
            });
        }
        if (phase.gemv != kLmHead) DecodeBarrier::arrive();
    }
    finish(step, shared);
}

// Partitions a GEMV so that the block with the most to read, weights and input, reads little more than the others.
// Every block reads `input_bytes` for each row of its split; 0 where a block needs all rows in any case.
GemvPartition partition_gemv(int matrices, int rows, int columns, int input_bytes, int blocks, int max_split_k) {
    const int sectors = columns / kSector, max_tile_sectors = kMaxVectors / matrices * kVector / kSector;
    long long min_cost = LLONG_MAX;
    GemvPartition best = {matrices, rows, columns};
    for (int splits = 1; splits <= std::min(max_split_k, blocks); ++splits) {
        const int split_rows = ceil_div(ceil_div(rows, splits), kUnit) * kUnit, blocks_per_split = blocks / splits;
        const int rounds = ceil_div(sectors, blocks_per_split * max_tile_sectors);
        const int tile_sectors = ceil_div(sectors, blocks_per_split * rounds);
        if (splits > 1 && rounds > 1) break;  // a block holds the input of one split
        long long cost =
            1LL * split_rows * (tile_sectors * rounds * matrices * kSectorBytes + input_bytes) / kSectorBytes;
        cost += splits * kSplitCost;
        if (split_rows > kMaxSplitRows) cost += 1LL << 40;  // only if there is no other way
        if (cost >= min_cost) continue;
        min_cost = cost;
        best.tile_n = tile_sectors * kSector;
        best.tiles = ceil_div(sectors, tile_sectors);
        best.split_rows = split_rows;
        best.split_k = ceil_div(rows, split_rows);
    }
    best.vectors_per_row = Divisor(matrices * best.tile_n / kVector);
    best.rows_per_iter = kThreads / best.vectors_per_row.value;
    while (2 << best.lanes_shift <= std::min(kWarp, kThreads / best.tile_n)) ++best.lanes_shift;
    return best;
}

// Lays out a block's shared memory, with as deep a ring as there is memory for.
SharedLayout lay_out_shared(const Step& step, int inputs, int limit) {
    const TangoDecodeShape& shape = step.shape;
    const int floats = sizeof(float), hidden = shape.hidden_size * floats;
    const bool quantized = shape.formats != TANGO_DECODE_FP16;
    SharedLayout layout = {};
    int used = 0;
    const auto add = [&](int& at, int bytes) {
        at = used;
        used += bytes;
    };
    used = kHeaderBytes;
    add(layout.residual, hidden);
    add(layout.input,
        (quantized ? (ceil_div(inputs, 128) + 1) * kMaxInputs : ceil_div(inputs, kUnit) * kUnit) * floats);
    add(layout.norm, hidden);
    add(layout.rope, shape.head_dim * floats);
    add(layout.accumulators, kAccumulatorFloats * floats);
    layout.ring_bytes = kRingBytes;
    if (quantized) layout.ring_bytes = std::max(kFp8RingBytes, ring_depth(limit - used, kZerosAt) * kWarps * kZerosAt);
    add(layout.ring, std::max(layout.ring_bytes, kKvTileBytes));
    layout.bytes = used;
    return layout;
}

// Everything about a step except its pointers and its position.
Step describe(const TangoDecodeShape& shape, int shared_limit) {
    Step step = {};
    step.shape = shape;
    const int attn_out = shape.heads * shape.head_dim, qkv = attn_out + 2 * shape.kv_heads * shape.head_dim;
    const int hidden_size = shape.hidden_size, intermediate = shape.intermediate, blocks = shape.blocks;
    const int chunks = kTypicalChunks * static_cast<int>(sizeof(float)), one = sizeof(float);
    step.partitions[kQkv] = partition_gemv(1, hidden_size, qkv, 0, blocks, kMaxSplitK);
    step.partitions[kOut] = partition_gemv(1, attn_out, hidden_size, chunks, blocks, kMaxSplitK);
    step.partitions[kGateUp] = partition_gemv(2, hidden_size, intermediate, 0, blocks, 1);
    step.partitions[kDown] = partition_gemv(1, intermediate, hidden_size, one, blocks, kMaxSplitK);
    step.partitions[kLmHead] = partition_gemv(1, hidden_size, shape.head_columns, 0, blocks, 1);
    step.kv_tile_size = kv_tile_size(shape.head_dim);
    while (kVector << step.lanes_shift < shape.head_dim) ++step.lanes_shift;
    step.group_size = shape.heads / shape.kv_heads;
    step.head_dim = Divisor(shape.head_dim);
    step.merged_columns = Divisor(std::min(step.partitions[kOut].split_rows / 4, kThreads));
    step.merge_groups = kThreads / step.merged_columns.value;
    const int queries = query_floats(step.group_size, shape.head_dim);
    const int inputs = std::max({hidden_size, attn_out, queries, step.partitions[kDown].split_rows});
    step.layout = lay_out_shared(step, inputs, shared_limit);
    return step;
}

int max_chunks(const Step& step) {
    return std::max(1, std::min(step.shape.blocks / step.shape.kv_heads, kChunkWeights / step.shape.heads));
}

// Sets the step's pointers into a workspace; returns its size.
size_t lay_out(Step& step, char* workspace) {
    const TangoDecodeShape& shape = step.shape;
    size_t used = 0;
    const auto add = [&](auto*& pointer, size_t count) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(workspace + used);
        used += (count * sizeof(*pointer) + kAlignment - 1) / kAlignment * kAlignment;
    };
    const size_t chunk_heads = static_cast<size_t>(max_chunks(step)) * shape.heads;
    const size_t max_split_k = std::max(step.partitions[kOut].split_k, step.partitions[kDown].split_k);
    add(step.arrived_blocks, 1);
    add(step.finished_blocks, 1);
    add(step.stopped, 1);
    add(step.best, 1);
    add(step.qkv, static_cast<size_t>(step.partitions[kQkv].split_k) * step.partitions[kQkv].columns);
    add(step.attn_out, chunk_heads * shape.head_dim);
    add(step.softmax, chunk_heads);
    add(step.residual_delta, max_split_k * shape.hidden_size);
    add(step.hidden, shape.intermediate);
    return used;
}

int check_tensors(const TangoDecodeShape& shape, const TangoDecodeTensors* tensors) {
    if (int status = check_weights(shape, tensors)) return status;
    if (int status = check_pointer("logits", tensors->logits, alignof(float))) return status;
    return tensors->best == nullptr ? TANGO_OK : check_pointer("best", tensors->best, alignof(TangoArgmax));
}

int check_words(const TangoDecodeWords* words) {
    if (int status = check_pointer("words", words, 1)) return status;
    if (int status = check_ranges({{"words", words->words, 1, INT_MAX}, {"stops", words->stops, 0, INT_MAX}}))
        return status;
    if (int status = check_pointer("table", words->table, 2)) return status;
    if (int status = check_pointer("row", words->row, sizeof(uint4))) return status;
    if (int status = check_pointer("mail", words->mail, alignof(uint32_t))) return status;
    if (int status = check_pointer("embedding", words->embedding, sizeof(uint4))) return status;
    return words->stops == 0 ? TANGO_OK : check_pointer("stop", words->stop, alignof(int32_t));
}

// Checks a shape, and describes a step of it on the current device.
int prepare(const TangoDecodeShape* given, Step& step) {
    TangoDecodeShape shape;
    DeviceProperties gpu;
    if (int status = take_shape(given, shape, gpu)) return status;
    step = describe(shape, gpu.shared_bytes);
    if (step.layout.bytes > gpu.shared_bytes)
        return fail(TANGO_BAD_ARGUMENT, "a block would need %d bytes of shared memory, this GPU has %d",
                    step.layout.bytes, gpu.shared_bytes);
    return TANGO_OK;
}

// Checks what a step is given except its embedding, and describes the step.
int describe_token(const TangoDecodeShape* shape, const TangoDecodeTensors* tensors, int32_t position, int32_t rotation,
                   void* workspace, size_t workspace_bytes, Step& step) {
    int status = prepare(shape, step);
    if (status == TANGO_OK) status = check_tensors(*shape, tensors);
    if (status == TANGO_OK)
        status =
            check_ranges({{"position", position, 0, shape->capacity - 1}, {"rotation", rotation, 0, kMaxRotation}});
    if (status == TANGO_OK) status = check_pointer("workspace", workspace, kAlignment);
    if (status != TANGO_OK) return status;
    const size_t needed = lay_out(step, static_cast<char*>(workspace));
    if (workspace_bytes < needed)
        return fail(TANGO_SMALL_WORKSPACE, "workspace has %zu bytes: it must have %zu", workspace_bytes, needed);
    step.tensors = *tensors;
    step.position = position;
    step.rotation = rotation;
    step.kv_chunk_size = ceil_div(position + 1, std::min(ceil_div(position + 1, kMinChunkSize), max_chunks(step)));
    step.kv_chunks = ceil_div(position + 1, step.kv_chunk_size);
    return TANGO_OK;
}

auto kernel_of(int formats) {
    if (formats == TANGO_DECODE_FP16) return decode<TANGO_DECODE_FP16>;
    return formats == TANGO_DECODE_MIXED ? decode<TANGO_DECODE_MIXED> : decode<TANGO_DECODE_BLOCKS_4>;
}

int launch_step(const Step& step, cudaStream_t stream) {
    const auto kernel = kernel_of(step.shape.formats);
    return cuda_status(launch_cooperative(kernel, step, step.shape.blocks, kBlock, step.layout.bytes, stream),
                       "decode");
}

// A token that was found, or -1 if it ends the sequence or has no embedding.
int32_t next_token(const TangoDecodeWords& words, int32_t found) {
    const bool stops = std::count(words.stop, words.stop + words.stops, found) > 0;
    return found < 0 || found >= words.words || stops ? -1 : found;
}

// Enqueues a step behind the mail with its token's embedding.
int launch_next(const Step& step, const Mail& mail, cudaStream_t stream) {
    const auto launched = launch(receive, mail, 1, kMailThreads, 0, stream);
    if (int status = cuda_status(launched, "wait for an embedding")) return status;
    return launch_step(step, stream);
}

}  // namespace
}  // namespace tango

using namespace tango;

int tango_decode_workspace(const TangoDecodeShape* shape, size_t* bytes) {
    Step step;
    if (int status = prepare(shape, step)) return status;
    if (int status = check_pointer("bytes", bytes, 1)) return status;
    *bytes = lay_out(step, nullptr);
    return TANGO_OK;
}

int tango_decode_enqueue(const TangoDecodeShape* shape, const TangoDecodeTensors* tensors, int32_t position,
                         int32_t rotation, void* workspace, size_t workspace_bytes, void* stream) {
    Step step;
    if (int status = describe_token(shape, tensors, position, rotation, workspace, workspace_bytes, step))
        return status;
    if (int status = check_pointer("embedding", tensors->embedding, 2)) return status;
    step.stopped = nullptr;
    return launch_step(step, static_cast<cudaStream_t>(stream));
}

int tango_decode_next(const TangoDecodeShape* shape, const TangoDecodeTensors* tensors, int32_t position,
                      int32_t rotation, const TangoDecodeWords* words, const int32_t* found, int32_t* token,
                      void* workspace, size_t workspace_bytes, void* stream) {
    Step step;
    if (int status = describe_token(shape, tensors, position, rotation, workspace, workspace_bytes, step))
        return status;
    if (int status = check_words(words)) return status;
    if (int status = check_pointer("found", found, alignof(int32_t))) return status;
    if (int status = check_pointer("token", token, alignof(int32_t))) return status;
    *token = -1;
    step.tensors.embedding = words->embedding;
    const auto on = static_cast<cudaStream_t>(stream);
    const int vectors = shape->hidden_size / kVector;
    const Mail mail = {
        words->mail, words->mail[0] + 1, static_cast<const uint4*>(words->row), static_cast<uint4*>(words->embedding),
        vectors,     step.stopped};
    Event work;
    if (int status = work.record(on)) return status;
    int32_t next = -1;
    const auto answer = [&] {
        next = next_token(*words, *found);
        send(*words, shape->hidden_size, next);
    };
    // With the mail sent before, a launch may also wait for its kernel, as debuggers have it.
    const bool is_done = work.is_done();
    if (is_done) answer();
    if (is_done && next < 0) return TANGO_OK;
    int status = launch_next(step, mail, on);
    if (!is_done) {  // whatever has failed, receive() waits for its mail
        const int waited = work.wait();
        if (waited == TANGO_OK)
            answer();
        else
            send(*words, shape->hidden_size, -1);
        if (status == TANGO_OK) status = waited;
    }
    if (status == TANGO_OK) *token = next;
    return status;
}
