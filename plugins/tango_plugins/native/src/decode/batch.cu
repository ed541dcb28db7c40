// A decode step of several sequences as one kernel (tango/decode.h), with the phases of decode.cu. A block prepares the
// inputs of all sequences, and multiplies its part of the weights by all of them at once.
//
//   phase      input of the GEMV        GEMV        output
//
//   kQkv       norm(residual)           qkv         qkv
//   attention                                       attn_out
//   kOut       attn_out                 out         residual
//   kGateUp    norm(residual)           gate, up    hidden = silu(gate) up
//   kDown      hidden                   down        residual
//   (these five for each layer, then)
//   kLmHead    norm(residual)           lm_head     logits
//
// Where several blocks compute parts of a result (the chunks of a sequence, the splits of kOut and kDown), the last of
// them to finish combines the parts, in their order.
#include <algorithm>
#include <climits>
#include <type_traits>

#include "batch.cuh"
#include "batch_blocks.cuh"
#include "batch_rows.cuh"
#include "common/check.h"
#include "common/device.h"
#include "linear/matrix.h"
#include "shape.h"

namespace tango {
namespace {

constexpr int kSectorBytes = kSector * sizeof(__half);
constexpr int kSplitCost = 64;  // sectors that can be read in the time of adding one more split
constexpr size_t kAlignment = 256;

// Whether this block is the last of those that compute the parts of a result, all of which it then sees. After a
// barrier of the block; the counter is zero again for the next result.
__device__ bool all_arrived(unsigned* arrived, int parts, int* is_last) {
    if (threadIdx.x == 0) {
        *is_last = add_one_acq_rel(arrived) == static_cast<unsigned>(parts - 1);
        if (*is_last) *arrived = 0;
    }
    sync_threads();
    return *is_last;
}

// The norm of a GEMV's input.
__device__ const float* norm_of(const BatchStep& step, const BatchShared& shared, const Phase& phase) {
    if (phase.gemv == kLmHead) return step.tensors.norm;
    const TangoDecodeLayer& weights = shared.layers[phase.layer % 2];
    return phase.gemv == kQkv ? weights.attention_norm : weights.mlp_norm;
}

// The residual stream begins with the embeddings; a block per sequence.
__device__ void embed(const BatchStep& step, const BatchShared& shared, float* warp_sums) {
    const int hidden_size = step.shape.hidden_size;
    const uint16_t* const places = shared.places_of(shared.layers[0].qkv);
    for (int s = blockIdx.x; s < step.count; s += gridDim.x) {
        float squares = 0.0f;
#pragma unroll 1
        for (int i = threadIdx.x; i < hidden_size; i += kThreads) {
            const float x = __half2float(step.sequences[s].embedding[i]);
            __stcg(step.residual + s * hidden_size + i, x);
            put(places, step.normed, i, s, x * shared.layers[0].attention_norm[i]);
            squares += x * x;
        }
        squares = warp_sum(squares);
        if (lane_id() == 0) warp_sums[warp_id()] = squares;
        sync_threads();
        if (warp_id() == 0) {
            squares = warp_sum(lane_id() < kWarps ? warp_sums[lane_id()] : 0.0f);
            if (lane_id() == 0) __stcg(step.squares + s, squares);
        }
        sync_threads();
    }
}

// Adds the splits of kOut or kDown to the columns of a part of the residual stream, which is the input of `next`. Two
// warps per sequence.
__device__ void add_to_residual(const BatchStep& step, const BatchShared& shared, const Phase& next,
                                const GemvPart& part) {
    const GemvPartition& partition = part.partition();
    const int splits = partition.split_k, hidden_size = partition.columns, tile = part.column() / partition.tile_n;
    const int s = warp_id() / 2, half = warp_id() % 2;
    const float* const norm = norm_of(step, shared, next);
    const uint16_t* const places = shared.places_of(shared.matrix(next.layer, next.gemv));
    static_assert(kWarps == 2 * kSequences);
    if (s >= step.count) return;
    float squares = 0.0f;
#pragma unroll 1
    for (int i = 4 * (half * kWarp + lane_id()); i < part.tiles() * kTileColumns; i += 4 * 2 * kWarp) {
        const int column = part.column() + i;
        float4* const residual = reinterpret_cast<float4*>(step.residual + s * hidden_size + column);
        const float4 weights = *reinterpret_cast<const float4*>(norm + column);
        float4 x = __ldcg(residual);
        add_splits<kMaxBatchSplitK>(x, step.residual_delta + s * hidden_size + column, splits,
                                    kSequences * hidden_size);
        __stcg(residual, x);
        put(places, step.normed, column, s, x.x * weights.x);
        put(places, step.normed, column + 1, s, x.y * weights.y);
        put(places, step.normed, column + 2, s, x.z * weights.z);
        put(places, step.normed, column + 3, s, x.w * weights.w);
        squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    }
    squares = warp_sum(squares);
    if (lane_id() == 0) __stcg(step.squares + (tile * 2 + half) * kSequences + s, squares);
}

// What a GEMV's results are multiplied by: the factor of each sequence's norm, from some sums of squares, or 1 without
// any. A warp per sequence.
__device__ void compute_scales(const BatchStep& step, float* scales, int sums) {
    const int s = warp_id();
    if (s >= step.count) return;
    float squares = 0.0f;
#pragma unroll 2
    for (int i = lane_id(); i < sums; i += kWarp) squares += __ldcg(step.squares + i * kSequences + s);
    squares = warp_sum(squares);
    const float scale = rsqrtf(squares / step.shape.hidden_size + step.shape.norm_eps);
    if (lane_id() == 0) scales[s] = kInputScale * (sums == 0 ? 1.0f : scale);
}

// Prepares the input of a GEMV in shared memory, the rows that the block needs: those after `first_rows` may be in
// flight when it returns. What fills it up is zero; what sequences have that are not there does not count.
__device__ void prepare_input(const BatchStep& step, const BatchShared& shared, const Phase& phase,
                              const GemvPart& part, int first_rows) {
    const Fragment* from = phase.gemv == kOut ? step.attn_out : phase.gemv == kDown ? step.hidden : step.normed;
    from += part.row() / kFragmentRows * kWarp;
    const int order = order_of(shared.matrix(phase.layer, phase.gemv));
    const int fragments = ceil_div(part.rows(), kInputRows) * (kInputRows / kFragmentRows);
    for (int group = 0, f = warp_id(); group < 2; ++group) {
#pragma unroll 1
        for (const int end = group == 0 ? first_rows / kFragmentRows : fragments; f < end; f += kWarps) {
            const int at = f * kWarp + lane_id();
            if (lane_id() / 4 >= step.count) continue;
            if (has_rows(order, f, part.rows()))
                copy_async(shared_address(shared.input + at), from + at);
            else
                shared.input[at] = {};
        }
        copy_commit();
    }
    int sums = 0;
    if (phase.gemv == kGateUp) sums = 2 * shared.partitions[kOut].tiles;
    if (phase.gemv == kQkv || phase.gemv == kLmHead) sums = 2 * shared.partitions[kDown].tiles;
    if (phase.gemv == kQkv && phase.layer == 0) sums = 1;
    compute_scales(step, shared.scales, sums);
    copy_wait<1>();
    sync_threads();
}

// Starts copies that depend on no other block, for later phases.
__device__ void copy_for_later(const BatchStep& step, const BatchShared& shared, const Phase& phase) {
    if (phase.gemv == kGateUp && phase.layer + 1 < step.shape.layers)
        copy_ahead(&shared.layers[(phase.layer + 1) % 2], step.tensors.layers + phase.layer + 1, 1);
}

// Brings into the L2 cache what blocks read besides matrices.
__device__ void prefetch(const void* from, int bytes) {
    const int own = (blockIdx.x * kThreads + threadIdx.x) * kSectorBytes;
    if (own < bytes) prefetch_l2(static_cast<const char*>(from) + own);
}

// Combines the chunks of a KV head's queries, for sequence `s`, which `step` is of.
__device__ void merge_parts(const SequenceStep& step, const SequenceShared& shared, int kv_head, int s,
                            const uint16_t* places, Fragment* attn_out) {
    const int group_size = step.group_size, head_dim = step.shape.head_dim, heads = step.shape.heads;
    const int first = kv_head * group_size, chunks = step.kv_chunks;
#pragma unroll 1
    for (int q = warp_id(); q < group_size; q += kWarps) {
        float2 own[kMaxBatchChunks / kWarp];
        float row_max = -INFINITY, row_sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kMaxBatchChunks / kWarp; ++i) {
            const int chunk = i * kWarp + lane_id();
            own[i] = make_float2(-INFINITY, 0.0f);
            if (chunk < chunks) own[i] = __ldcg(step.softmax + chunk * heads + first + q);
            row_max = fmaxf(row_max, own[i].x);
        }
        row_max = warp_max(row_max);
#pragma unroll
        for (int i = 0; i < kMaxBatchChunks / kWarp; ++i) {
            own[i].x = expf(own[i].x - row_max);
            row_sum += own[i].x * own[i].y;
        }
        row_sum = warp_sum(row_sum);
#pragma unroll
        for (int i = 0; i < kMaxBatchChunks / kWarp; ++i)
            shared.chunk_weights[q * kMaxBatchChunks + i * kWarp + lane_id()] = own[i].x / row_sum;
    }
    sync_threads();
#pragma unroll 1
    for (int i = 2 * threadIdx.x; i < group_size * head_dim; i += 2 * kThreads) {
        const float* const weights = shared.chunk_weights + i / head_dim * kMaxBatchChunks;
        const float* const from = step.attn_out + first * head_dim + i;
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 1
        for (int begin = 0; begin < chunks; begin += kParts) {
            float2 part[kParts];
#pragma unroll
            for (int c = 0; c < kParts; ++c) {  // no branch: past the end, weights are 0
                const int chunk = min(begin + c, chunks - 1);
                part[c] = __ldcg(reinterpret_cast<const float2*>(from + chunk * heads * head_dim));
            }
#pragma unroll
            for (int c = 0; c < kParts; ++c) {
                sum.x += weights[begin + c] * part[c].x;
                sum.y += weights[begin + c] * part[c].y;
            }
        }
        put(places, attn_out, first * head_dim + i, s, sum.x);
        put(places, attn_out, first * head_dim + i + 1, s, sum.y);
    }
    sync_threads();
}

// Attention between kQkv and kOut: the blocks share all chunks of all KV heads of all sequences.
__device__ void attention(const BatchStep& step, const BatchShared& shared, int layer) {
    const TangoDecodeLayer& weights = shared.layers[layer % 2];
    SequenceShared own(step, shared);
#pragma unroll 1
    for (int part = blockIdx.x; part < step.attention_parts; part += gridDim.x) {
        int s = 0;
        while (s + 1 < step.count && part >= step.sequences[s + 1].first_part) ++s;
        const SequenceStep sequence(step, s);
        own.layers = step.sequences[s].caches + layer / 2 * 2;
        own.rope = shared.rope + s * step.shape.head_dim / 2;
        const Chunk chunk(sequence, own, layer, part - step.sequences[s].first_part);
        chunk.copy_first_tile(sequence);
        if (part == static_cast<int>(blockIdx.x)) grid_barrier::wait();
        attend(sequence, own, chunk, static_cast<const __half*>(weights.qkv_bias));
        unsigned* const arrived = step.arrived_parts + s * step.shape.kv_heads + chunk.kv_head;
        if (all_arrived(arrived, sequence.kv_chunks, shared.is_last))
            merge_parts(sequence, own, chunk.kv_head, s, shared.places_of(weights.out), step.attn_out);
    }
    if (static_cast<int>(blockIdx.x) >= step.attention_parts) grid_barrier::wait();
    grid_barrier::arrive();
}

// Calls use(gemv) with the GEMV of a phase.
template <bool kQuantized, typename Use>
__device__ void with_gemv(const GemvPart& part, const Ring& ring, const TangoMatrix& first, const TangoMatrix& second,
                          Use use) {
    if (!kQuantized || first.weights == TANGO_WEIGHTS_FP16)
        use(BatchRows<__half>(part, ring, first, second));
    else if (first.weights == TANGO_WEIGHTS_INT8)
        use(BatchRows<int8_t>(part, ring, first, second));
    else if (first.weights == TANGO_WEIGHTS_BLOCKS_4)
        use(BatchBlocks<4>(part, ring, first, second));
    else
        use(BatchBlocks<8>(part, ring, first, second));
}

// Stores what a lane has of a GEMV. `places` are those of kDown's input.
__device__ void store(const BatchStep& step, const float* scales, int gemv, const GemvPart& part,
                      const uint16_t* places, const BatchResults& results) {
    const GemvPartition& partition = part.partition();
#pragma unroll 1
    for (int tile = warp_id(); tile < part.tiles(); tile += kWarps) {
        const float4 sums = tile < kWarps ? results.first : results.second;
        const float sum[4] = {sums.x, sums.y, sums.z, sums.w};
        const float up[4] = {results.second.x, results.second.y, results.second.z, results.second.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int s = lane_id() % 4 * 2 + i % 2;
            const int column = part.column() + tile * kTileColumns + results.column + i / 2 * results.distance;
            if (s >= step.count) continue;
            const float own = sum[i] * scales[s];
            float* to = step.residual_delta + (part.split() * kSequences + s) * partition.columns;
            if (gemv == kQkv) to = step.qkv + (s * partition.split_k + part.split()) * partition.columns;
            if (gemv == kLmHead) to = step.sequences[s].logits;
            if (gemv == kGateUp)
                put(places, step.hidden, column, s, own / (1.0f + expf(-own)) * (up[i] * scales[s]));
            else if (gemv != kLmHead || column < step.shape.vocabulary)
                __stcg(to + column, own);
        }
    }
}

template <bool kQuantized>
__global__ void __launch_bounds__(kBlock, 1) decode_batch(const BatchStep step) {
    const TangoDecodeShape& shape = step.shape;
    const BatchShared shared(step, shared_memory());
    if (threadIdx.x >= kThreads) {
        grid_barrier_warp(step.arrived_blocks, (kLmHead + 1) * shape.layers + 1);
        return;
    }
    copy_ahead(shared.layers, step.tensors.layers, 1);
    for (int i = threadIdx.x; i < step.count * (shape.head_dim / 2); i += kThreads) {
        const int s = i / (shape.head_dim / 2), d = i - s * (shape.head_dim / 2);
        float sine, cosine;
        sincosf(step.sequences[s].rotation * step.tensors.frequencies[d], &sine, &cosine);
        shared.rope[i] = make_float2(cosine, sine);
    }
    if (threadIdx.x < kGemvs) shared.partitions[threadIdx.x] = step.partitions[threadIdx.x];
    if (threadIdx.x == 0) {
        *shared.head = step.tensors.head;
        *shared.phase = Phase();
    }
    if (threadIdx.x < kOrders * kUnit) shared.places[threadIdx.x] = place_of(threadIdx.x / kUnit, threadIdx.x % kUnit);
    copy_wait<0>();
    sync_threads();
    embed(step, shared, reinterpret_cast<float*>(shared.input));
    grid_barrier::arrive();
    // One loop over all GEMVs, as in decode.cu: the code has to fit the instruction cache.
#pragma unroll 1
    for (const Phase& phase = *shared.phase; phase.layer <= shape.layers;) {
        const TangoDecodeLayer& weights = shared.layers[phase.layer % 2];
        if (phase.gemv == kOut) attention(step, shared, phase.layer);
        copy_for_later(step, shared, phase);
        if (phase.gemv == kQkv) prefetch(weights.qkv_bias, step.partitions[kQkv].columns * sizeof(__half));
        if (phase.gemv == kOut || phase.gemv == kDown)
            prefetch(norm_of(step, shared, phase.next(shape.layers)), shape.hidden_size * sizeof(float));
        const GemvPartition& partition = shared.partitions[phase.gemv];
        GemvPart part(partition);
        do {
            BatchResults results = {};
            with_gemv<kQuantized>(part, shared.ring(step, partition), shared.matrix(phase.layer, phase.gemv),
                                  weights.up, [&](auto gemv) {
                                      gemv.start();
                                      if (part.is_first()) {
                                          grid_barrier::wait();
                                          prepare_input(step, shared, phase, part, gemv.first_rows());
                                      }
                                      results = accumulate(gemv, shared.input);
                                  });
            if (part.is_valid()) store(step, shared.scales, phase.gemv, part, shared.places_of(weights.down), results);
            sync_threads();
            const bool adds = phase.gemv == kOut || phase.gemv == kDown;
            if (adds && part.is_valid() &&
                all_arrived(step.arrived_parts + part.column() / partition.tile_n, partition.split_k, shared.is_last))
                add_to_residual(step, shared, phase.next(shape.layers), part);
        } while (part.next());
        if (phase.gemv != kLmHead) grid_barrier::arrive();
        sync_threads();
        if (threadIdx.x == 0) *shared.phase = phase.next(shape.layers);
        sync_threads();
    }
    finish(step.arrived_blocks, step.finished_blocks);
}

// Partitions a GEMV so that the block with the most to read, weights and input, reads little more than the others. The
// input of a block has at most `max_rows` rows; split_k is 0 if there is no such way.
GemvPartition partition_gemv(int matrices, int rows, int columns, int blocks, int max_split_k, int max_rows) {
    const int tiles = columns / kTileColumns;
    long long min_cost = LLONG_MAX;
    GemvPartition best = {matrices, rows, columns};
    for (int splits = 1; splits <= std::min(max_split_k, blocks); ++splits) {
        const int split_rows = ceil_div(ceil_div(rows, splits), kUnit) * kUnit, blocks_per_split = blocks / splits;
        if (split_rows > max_rows) continue;
        const int rounds = ceil_div(tiles, blocks_per_split * (kMaxTiles / matrices));
        const int width = ceil_div(tiles, blocks_per_split * rounds);
        if (splits > 1 && rounds > 1) break;  // a block holds the input of one split
        const int input_bytes = kSequences * static_cast<int>(sizeof(float));
        long long cost = 1LL * split_rows * (width * rounds * matrices + input_bytes / kSectorBytes);
        cost += splits * (kSplitCost + width * kTileColumns * input_bytes / kSectorBytes);
        if (cost >= min_cost) continue;
        min_cost = cost;
        best.tile_n = width * kTileColumns;
        best.tiles = ceil_div(tiles, width);
        best.split_rows = split_rows;
        best.split_k = ceil_div(rows, split_rows);
    }
    return best;
}

// Everything about a step except its pointers and sequences, for blocks with so many bytes of shared memory. Where
// these do not suffice, a split_k is 0.
BatchStep describe(const TangoDecodeShape& shape, int shared_bytes) {
    BatchStep step = {};
    step.shape = shape;
    step.shared_bytes = shared_bytes;
    step.lanes_per_key = 1;
    while (step.lanes_per_key * kVector < shape.head_dim) step.lanes_per_key *= 2;
    const int row_bytes = shape.head_dim * static_cast<int>(sizeof(__half));
    step.kv_tile_size = std::min(kMaxKvTile, kMinRingBytes / 2 / row_bytes);
    const BatchShared shared(step, nullptr);
    const auto left = [&](const void* begin) {
        return shared_bytes - kMinRingBytes - static_cast<int>(reinterpret_cast<size_t>(begin));
    };
    if (left(SequenceShared(step, shared).key_tile()) < 0) return step;
    constexpr int kRowBytes = kWarp * sizeof(Fragment) / kFragmentRows;
    const int max_rows = left(shared.input) / kRowBytes / kInputRows * kInputRows;
    const int hidden_size = shape.hidden_size, attn_out = step.attn_width();
    const int qkv = attn_out + 2 * shape.kv_heads * shape.head_dim;
    const auto partition = [&](int matrices, int rows, int columns, int max_split_k) {
        return partition_gemv(matrices, rows, columns, shape.blocks, max_split_k, max_rows);
    };
    step.partitions[kQkv] = partition(1, hidden_size, qkv, kMaxSplitK);
    step.partitions[kOut] = partition(1, attn_out, hidden_size, kMaxBatchSplitK);
    step.partitions[kGateUp] = partition(2, hidden_size, shape.intermediate, 1);
    step.partitions[kDown] = partition(1, shape.intermediate, hidden_size, kMaxBatchSplitK);
    step.partitions[kLmHead] = partition(1, hidden_size, shape.head_columns, 1);
    return step;
}

bool fits(const BatchStep& step) {
    return std::all_of(step.partitions, step.partitions + kGemvs, [](const GemvPartition& p) { return p.split_k > 0; });
}

// Sets the step's pointers into a workspace; returns its size.
size_t lay_out(BatchStep& step, char* workspace) {
    const TangoDecodeShape& shape = step.shape;
    size_t used = 0;
    const auto add = [&](auto*& pointer, size_t count) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(workspace + used);
        used += (count * sizeof(*pointer) + kAlignment - 1) / kAlignment * kAlignment;
    };
    const GemvPartition &qkv = step.partitions[kQkv], &out = step.partitions[kOut], &down = step.partitions[kDown];
    const size_t tiles = std::max(out.tiles, down.tiles), chunk_heads = kSequences * kMaxBatchChunks * shape.heads;
    const auto add_input = [&](Fragment*& pointer, int rows) { add(pointer, ceil_div(rows, kUnit) * kUnit * 2); };
    add(step.arrived_blocks, 1);
    add(step.finished_blocks, 1);
    add(step.arrived_parts, std::max<size_t>(tiles, kSequences * shape.kv_heads));
    add(step.residual, kSequences * shape.hidden_size);
    add(step.squares, kSequences * 2 * tiles);
    add_input(step.normed, shape.hidden_size);
    add(step.qkv, static_cast<size_t>(kSequences) * qkv.split_k * qkv.columns);
    add(step.chunk_out, chunk_heads * shape.head_dim);
    add(step.softmax, chunk_heads);
    add_input(step.attn_out, step.attn_width());
    add(step.residual_delta, static_cast<size_t>(kSequences) * std::max(out.split_k, down.split_k) * shape.hidden_size);
    add_input(step.hidden, shape.intermediate);
    return used;
}

// Checks a shape, and describes a step of it on the current device.
int prepare(const TangoDecodeShape* given, BatchStep& step) {
    TangoDecodeShape shape;
    DeviceProperties gpu;
    if (int status = take_shape(given, shape, gpu)) return status;
    step = describe(shape, gpu.shared_bytes);
    if (fits(step)) return TANGO_OK;
    return fail(TANGO_BAD_ARGUMENT, "the inputs of %d sequences do not fit into a block's shared memory, %d bytes",
                kSequences, gpu.shared_bytes);
}

// Checks a sequence, and describes it.
int add_sequence(BatchStep& step, const TangoDecodeSequence& given) {
    int status = check_pointer("caches", given.caches, 16);
    if (status == TANGO_OK) status = check_pointer("embedding", given.embedding, 2);
    if (status == TANGO_OK) status = check_pointer("logits", given.logits, 4);
    if (status == TANGO_OK)
        status = check_ranges({{"capacity", given.capacity, 1, kMaxCapacity},
                               {"position", given.position, 0, given.capacity - 1},
                               {"rotation", given.rotation, 0, kMaxRotation}});
    if (status != TANGO_OK) return status;
    BatchSequence& sequence = step.sequences[step.count++];
    sequence = {given.caches, static_cast<const __half*>(given.embedding), given.logits};
    sequence.capacity = given.capacity;
    sequence.position = given.position;
    sequence.rotation = given.rotation;
    const int positions = given.position + 1;  // they alone decide how the sequence is cut, whatever the others are
    sequence.kv_chunk_size = ceil_div(positions, std::min(ceil_div(positions, kBatchChunkSize), kMaxBatchChunks));
    sequence.kv_chunks = ceil_div(positions, sequence.kv_chunk_size);
    sequence.first_part = step.attention_parts;
    step.attention_parts += sequence.kv_chunks * step.shape.kv_heads;
    return TANGO_OK;
}

}  // namespace
}  // namespace tango

using namespace tango;

int tango_decode_batch_workspace(const TangoDecodeShape* shape, size_t* bytes) {
    BatchStep step;
    if (int status = prepare(shape, step)) return status;
    if (int status = check_pointer("bytes", bytes, 1)) return status;
    *bytes = lay_out(step, nullptr);
    return TANGO_OK;
}

int tango_decode_batch_enqueue(const TangoDecodeShape* shape, const TangoDecodeTensors* tensors,
                               const TangoDecodeSequence* sequences, int32_t count, void* workspace,
                               size_t workspace_bytes, void* stream) {
    BatchStep step;
    int status = prepare(shape, step);
    if (status == TANGO_OK) status = check_weights(*shape, tensors);
    if (status == TANGO_OK && tensors->head.weights == TANGO_WEIGHTS_FP8)
        return fail(TANGO_BAD_ARGUMENT, "head is FP8, which steps of several sequences do not read");
    if (status == TANGO_OK) status = check_pointer("sequences", sequences, 8);
    if (status == TANGO_OK) status = check_ranges({{"count", count, 1, kSequences}});
    if (status == TANGO_OK) status = check_pointer("workspace", workspace, kAlignment);
    for (int i = 0; status == TANGO_OK && i < count; ++i) status = add_sequence(step, sequences[i]);
    if (status != TANGO_OK) return status;
    const size_t needed = lay_out(step, static_cast<char*>(workspace));
    if (workspace_bytes < needed)
        return fail(TANGO_SMALL_WORKSPACE, "workspace has %zu bytes: it must have %zu", workspace_bytes, needed);
    step.tensors = *tensors;
    const auto kernel = shape->quantized ? decode_batch<true> : decode_batch<false>;
    const auto grid_stream = static_cast<cudaStream_t>(stream);
    return cuda_status(launch_cooperative(kernel, step, step.shape.blocks, kBlock, step.shared_bytes, grid_stream),
                       "decode");
}
