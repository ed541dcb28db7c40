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
#include "batch_columns.cuh"
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

// The last block to finish resets the counters for the next step.
__device__ void finish(const BatchStep& step) {
    if (threadIdx.x != 0 || atomicAdd(step.finished_blocks, 1u) != gridDim.x - 1) return;
    *step.arrived_blocks = 0;
    *step.finished_blocks = 0;
}

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

// The residual stream begins with the embeddings; a block per sequence.
__device__ void embed(const BatchStep& step, float* warp_sums) {
    const int hidden_size = step.shape.hidden_size;
    for (int s = blockIdx.x; s < step.count; s += gridDim.x) {
        float squares = 0.0f;
        for (int i = threadIdx.x; i < hidden_size; i += kThreads) {
            const float x = __half2float(step.sequences[s].embedding[i]);
            __stcg(step.residual + s * hidden_size + i, x);
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

// Adds the splits of kOut or kDown to some columns of the residual stream, a warp per sequence.
__device__ void add_to_residual(const BatchStep& step, int splits, int tile, int column, int columns) {
    const int s = warp_id(), hidden_size = step.shape.hidden_size;
    if (s >= step.count) return;
    float squares = 0.0f;
#pragma unroll 2
    for (int c = column + lane_id(); c < column + columns; c += kWarp) {
        float sum = __ldcg(step.residual + s * hidden_size + c);
        const float* const from = step.residual_delta + s * hidden_size + c;
#pragma unroll
        for (int split = 0; split < kMaxBatchSplitK; ++split)
            if (split < splits) sum += __ldcg(from + split * kSequences * hidden_size);
        __stcg(step.residual + s * hidden_size + c, sum);
        squares += sum * sum;
    }
    squares = warp_sum(squares);
    if (lane_id() == 0) __stcg(step.squares + tile * kSequences + s, squares);
}

// The factor of each sequence's norm, from the squares of all tiles; a warp per sequence.
__device__ void compute_scales(const BatchStep& step, float* scales, int tiles) {
    const int s = warp_id();
    if (s < kSequences) {
        float squares = 0.0f;
        for (int tile = lane_id(); tile < tiles && s < step.count; tile += kWarp)
            squares += __ldcg(step.squares + tile * kSequences + s);
        squares = warp_sum(squares);
        if (lane_id() == 0) scales[s] = rsqrtf(squares / step.shape.hidden_size + step.shape.norm_eps);
    }
    sync_threads();
}

// The input of a GEMV: rows [row, row + rows) of `from` [sequences, width].
struct Input {
    const float* from;
    int width, row, rows;
    const float* norm;  // weights of a norm, or null
    int distance;       // of the pairs of rows of a lane, see first_row()
    float odd;          // factor of every other row, whose weights are that much too large

    // Matrices that lie by columns have the order of PackedInts.
    __device__ bool is_for_columns() const { return distance != kRowDistance; }

    __device__ int fragments() const { return ceil_div(rows, kUnit) * (kUnit / kFragmentRows); }

    // A lane's part of a fragment is two pairs of rows, the first from here on.
    __device__ int first_row(int fragment) const {
        const int t = lane_id() % 4;
        return is_for_columns() ? fragment / 2 * kUnit + t * 8 + fragment % 2 * (8 / distance)
                                : fragment * kFragmentRows + t * 2;
    }
};

// Starts copying an input to where its fragments will be. What fills it up, and sequences that are not there, are zero.
__device__ void copy_input(const Input& input, int count, Fragment* fragments) {
    const int s = lane_id() / 4;
    const float* const own = input.from + s * input.width + input.row;
#pragma unroll 4
    for (int fragment = warp_id(); fragment < input.fragments(); fragment += kWarps) {
        Fragment* const to = fragments + fragment * kWarp + lane_id();
        const int r = input.first_row(fragment);
        if (r < input.rows && s < count) {
            copy_async_pair(shared_address(to), own + r);
            copy_async_pair(shared_address(&to->z), own + r + input.distance);
        } else {
            *to = {};
        }
    }
    copy_commit();
}

// Makes fragments of it: each thread of what it has copied itself.
__device__ void make_fragments(const Input& input, const float* scales, Fragment* fragments) {
    const float scale = input.norm == nullptr ? 1.0f : scales[lane_id() / 4];
#pragma unroll 4
    for (int fragment = warp_id(); fragment < input.fragments(); fragment += kWarps) {
        Fragment& own = fragments[fragment * kWarp + lane_id()];
        const float4 x = *reinterpret_cast<const float4*>(&own);
        float2 first = make_float2(x.x, x.y), second = make_float2(x.z, x.w);
        const int r = input.first_row(fragment);
        if (input.norm != nullptr && r < input.rows) {
            const float2 a = *reinterpret_cast<const float2*>(input.norm + input.row + r);
            const float2 b = *reinterpret_cast<const float2*>(input.norm + input.row + r + input.distance);
            first = make_float2(first.x * scale * a.x, first.y * scale * a.y);
            second = make_float2(second.x * scale * b.x, second.y * scale * b.y);
        }
        own = input.is_for_columns() ? make_fragment({first.x, second.x}, {first.y * input.odd, second.y * input.odd})
                                     : make_fragment(first, second);
    }
    sync_threads();
}

// The GEMV at an index of the sequence of all GEMVs.
struct Phase {
    int layer, gemv;

    __device__ Phase(int index, int layers)
        : layer(index / kLmHead), gemv(layer < layers ? index % kLmHead : kLmHead) {}
};

// Prepares the input of a GEMV in shared memory, the rows that the block needs.
__device__ void prepare_input(const BatchStep& step, const BatchShared& shared, const Phase& phase,
                              const BatchPart& part) {
    const TangoDecodeLayer& weights = shared.layers[phase.layer % 2];
    const BatchPartition* const partitions = shared.partitions;
    Input input = {step.residual, partitions[phase.gemv].rows, part.row(), part.rows(), nullptr, kRowDistance, 1.0f};
    if (phase.gemv == kOut) input.from = step.attn_out;
    if (phase.gemv == kDown) input.from = step.hidden;
    if (phase.gemv == kQkv) input.norm = weights.attention_norm;
    if (phase.gemv == kGateUp) input.norm = weights.mlp_norm;
    if (phase.gemv == kLmHead) input.norm = step.tensors.norm;
    const int form = shared.matrix(phase.layer, phase.gemv).weights;
    if (form == TANGO_WEIGHTS_BLOCKS_4) {
        input.distance = PackedInts<4>::kDistance;
        input.odd = 1.0f / PackedInts<4>::kOdd;
    } else if (form > TANGO_WEIGHTS_BLOCKS_4) {
        input.distance = PackedInts<8>::kDistance;
    }
    copy_input(input, step.count, shared.input);
    const bool is_first = phase.layer == 0 && phase.gemv == kQkv;
    if (input.norm != nullptr)
        compute_scales(step, shared.scales, is_first ? 1 : partitions[phase.gemv == kGateUp ? kOut : kDown].tiles);
    copy_wait<0>();
    make_fragments(input, shared.scales, shared.input);
}

// Starts copies that depend on no other block, for later phases.
__device__ void copy_for_later(const BatchStep& step, const BatchShared& shared, const Phase& phase) {
    if (phase.gemv == kGateUp && phase.layer + 1 < step.shape.layers)
        copy_ahead(&shared.layers[(phase.layer + 1) % 2], step.tensors.layers + phase.layer + 1, 1);
}

// Brings into the L2 cache what this layer reads besides matrices.
__device__ void prefetch_vectors(const BatchStep& step, const TangoDecodeLayer& weights) {
    const int columns = step.partitions[kQkv].columns, hidden_size = step.shape.hidden_size;
    const __half* const bias = static_cast<const __half*>(weights.qkv_bias);
    const int own = blockIdx.x * kThreads + threadIdx.x;  // a sector of one of the two
    if (own < columns / kSector)
        prefetch_l2(bias + own * kSector);
    else if (own < columns / kSector + hidden_size / 8)
        prefetch_l2(weights.mlp_norm + (own - columns / kSector) * 8);
}

// Combines the chunks of a KV head's queries, for the sequence that `step` is of.
__device__ void merge_parts(const SequenceStep& step, const SequenceShared& shared, int kv_head, float* attn_out) {
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
            own[i].x = exp2_fast(own[i].x - row_max);
            row_sum += own[i].x * own[i].y;
        }
        row_sum = warp_sum(row_sum);
#pragma unroll
        for (int i = 0; i < kMaxBatchChunks / kWarp; ++i)
            shared.chunk_weights[q * kMaxBatchChunks + i * kWarp + lane_id()] = own[i].x / row_sum;
    }
    sync_threads();
#pragma unroll 1
    for (int i = 4 * threadIdx.x; i < group_size * head_dim; i += 4 * kThreads) {
        const float* const weights = shared.chunk_weights + i / head_dim * kMaxBatchChunks;
        const float* const from = step.attn_out + first * head_dim + i;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const float4 part = __ldcg(reinterpret_cast<const float4*>(from + chunk * heads * head_dim));
            const float w = weights[chunk];
            sum = sum + make_float4(w * part.x, w * part.y, w * part.z, w * part.w);
        }
        __stcg(reinterpret_cast<float4*>(attn_out + first * head_dim + i), sum);
    }
    sync_threads();
}

// Attention between kQkv and kOut: the blocks share all chunks of all KV heads of all sequences.
__device__ void attention(const BatchStep& step, const BatchShared& shared, int layer) {
    const __half* const bias = static_cast<const __half*>(shared.layers[layer % 2].qkv_bias);
    SequenceShared own(step, shared);
    bool waits = true;
#pragma unroll 1
    for (int part = blockIdx.x; part < step.attention_parts; part += gridDim.x) {
        int s = 0;
        while (s + 1 < step.count && part >= step.sequences[s + 1].first_part) ++s;
        const SequenceStep sequence(step, s);
        own.layers = step.sequences[s].caches + layer / 2 * 2;
        own.rope = shared.rope + s * step.shape.head_dim / 2;
        const Chunk chunk(sequence, own, layer, part - step.sequences[s].first_part);
        chunk.copy_first_tile(sequence);
        if (waits) grid_barrier::wait();
        waits = false;
        attend(sequence, own, chunk, bias);
        unsigned* const arrived = step.arrived_parts + s * step.shape.kv_heads + chunk.kv_head;
        if (all_arrived(arrived, sequence.kv_chunks, shared.is_last))
            merge_parts(sequence, own, chunk.kv_head, step.attn_out + s * step.attn_width());
    }
    if (waits) grid_barrier::wait();
    grid_barrier::arrive();
}

// Calls use(gemv) with the GEMV of a phase.
template <bool kQuantized, typename Use>
__device__ void with_gemv(const BatchPart& part, const BatchShared& shared, const TangoMatrix& first,
                          const TangoMatrix& second, Use use) {
    if (!kQuantized || first.weights == TANGO_WEIGHTS_FP16)
        use(BatchGemv<BatchRows<__half>>(part, shared.ring, kBatchRingBytes, first, second));
    else if (first.weights == TANGO_WEIGHTS_INT8)
        use(BatchGemv<BatchRows<int8_t>>(part, shared.ring, kBatchRingBytes, first, second));
    else if (first.weights == TANGO_WEIGHTS_BLOCKS_4)
        use(BatchGemv<BatchColumns<TANGO_WEIGHTS_BLOCKS_4>>(part, shared.ring, kBatchRingBytes, first, second));
    else if (first.weights == TANGO_WEIGHTS_BLOCKS_8)
        use(BatchGemv<BatchColumns<TANGO_WEIGHTS_BLOCKS_8>>(part, shared.ring, kBatchRingBytes, first, second));
    else
        use(BatchGemv<BatchColumns<TANGO_WEIGHTS_FP8>>(part, shared.ring, kBatchRingBytes, first, second));
}

// Stores a result of a GEMV.
__device__ void store(const BatchStep& step, int gemv, const BatchPartition& partition, int column, int split, int s,
                      float sum, float up) {
    if (s >= step.count) return;
    const int columns = partition.columns;
    if (gemv == kQkv)
        __stcg(step.qkv + (s * partition.split_k + split) * columns + column, sum);
    else if (gemv == kGateUp)
        __stcg(step.hidden + s * columns + column, sum / (1.0f + expf(-sum)) * up);
    else if (gemv != kLmHead)
        __stcg(step.residual_delta + (split * kSequences + s) * columns + column, sum);
    else if (column < step.shape.vocabulary)
        __stcg(step.sequences[s].logits + column, sum);
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
    embed(step, reinterpret_cast<float*>(shared.input));
    grid_barrier::arrive();
    for (int i = threadIdx.x; i < step.count * (shape.head_dim / 2); i += kThreads) {
        const int s = i / (shape.head_dim / 2), d = i - s * (shape.head_dim / 2);
        float sine, cosine;
        sincosf(step.sequences[s].rotation * step.tensors.frequencies[d], &sine, &cosine);
        shared.rope[i] = make_float2(cosine, sine);
    }
    if (threadIdx.x < kGemvs) shared.partitions[threadIdx.x] = step.partitions[threadIdx.x];
    if (threadIdx.x == 0) *shared.head = step.tensors.head;
    copy_wait<0>();
    sync_threads();
    // One loop over all GEMVs, as in decode.cu: the code has to fit the instruction cache.
#pragma unroll 1
    for (int index = 0; index <= kLmHead * shape.layers; ++index) {
        const Phase phase(index, shape.layers);
        if (phase.gemv == kOut) attention(step, shared, phase.layer);
        if (phase.gemv == kQkv) prefetch_vectors(step, shared.layers[phase.layer % 2]);
        copy_for_later(step, shared, phase);
        const BatchPartition& partition = shared.partitions[phase.gemv];
        const BatchPart part(partition);
        const TangoMatrix &first = shared.matrix(phase.layer, phase.gemv), &second = shared.layers[phase.layer % 2].up;
        with_gemv<kQuantized>(part, shared, first, second, [](auto gemv) { gemv.start(); });
        grid_barrier::wait();
        prepare_input(step, shared, phase, part);
        const auto emit = [&](int column, int split, int s, float sum, float up) {
            store(step, phase.gemv, partition, column, split, s, sum, up);
        };
        const auto done = [&](int tile, int column, int columns) {
            if (phase.gemv != kOut && phase.gemv != kDown) return;
            if (all_arrived(step.arrived_parts + tile, partition.split_k, shared.is_last))
                add_to_residual(step, partition.split_k, tile, column, columns);
        };
        with_gemv<kQuantized>(part, shared, first, second, [&](auto gemv) {
            gemv.skip_started();
            gemv.run(shared.input, emit, done);
        });
        if (phase.gemv != kLmHead) grid_barrier::arrive();
    }
    finish(step);
}

// Partitions a GEMV so that the block with the most to read, weights and input, reads little more than the others. The
// input of a block has at most `max_rows` rows; split_k is 0 if there is no such way.
BatchPartition partition_gemv(int matrices, int rows, int columns, int blocks, int max_split_k, int max_rows) {
    const int tiles = columns / kTile;
    long long min_cost = LLONG_MAX;
    BatchPartition best = {matrices, rows, columns};
    for (int splits = 1; splits <= std::min(max_split_k, blocks); ++splits) {
        const int split_rows = ceil_div(ceil_div(rows, splits), kUnit) * kUnit, blocks_per_split = blocks / splits;
        if (split_rows > max_rows) continue;
        const int rounds = ceil_div(tiles, blocks_per_split * (kMaxTiles / matrices));
        const int width = ceil_div(tiles, blocks_per_split * rounds);
        if (splits > 1 && rounds > 1) break;  // a block holds the input of one split
        const int input_bytes = kSequences * static_cast<int>(sizeof(float));
        long long cost = 1LL * split_rows * (width * rounds * matrices + input_bytes / kSectorBytes);
        cost += splits * (kSplitCost + width * kTile * input_bytes / kSectorBytes);
        if (cost >= min_cost) continue;
        min_cost = cost;
        best.tile_n = width * kTile;
        best.tiles = ceil_div(tiles, width);
        best.split_rows = split_rows;
        best.split_k = ceil_div(rows, split_rows);
    }
    return best;
}

// Everything about a step except its pointers and sequences, for blocks with so many bytes of shared memory. Where
// these do not suffice, a split_k is 0.
BatchStep describe(const TangoDecodeShape& shape, size_t shared_bytes) {
    BatchStep step = {};
    step.shape = shape;
    while (kVector << step.lanes_shift < shape.head_dim) ++step.lanes_shift;
    step.kv_tile_size = kv_tile_size(shape.head_dim);
    step.input_bytes = SequenceShared(step, BatchShared(step, nullptr)).input_bytes();
    step.input_bytes = ceil_div(step.input_bytes, sizeof(Fragment)) * sizeof(Fragment);
    const size_t needed = reinterpret_cast<size_t>(BatchShared(step, nullptr).end);
    if (needed > shared_bytes) return step;
    constexpr int kRowBytes = kWarp * sizeof(Fragment) / kFragmentRows;
    const int max_rows = (step.input_bytes + static_cast<int>(shared_bytes - needed)) / kRowBytes / kUnit * kUnit;
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
    for (const BatchPartition& gemv : step.partitions)
        step.input_bytes = std::max(step.input_bytes, gemv.split_rows * kRowBytes);
    return step;
}

bool fits(const BatchStep& step) {
    return std::all_of(step.partitions, step.partitions + kGemvs,
                       [](const BatchPartition& p) { return p.split_k > 0; });
}

// Sets the step's pointers into a workspace; returns its size.
size_t lay_out(BatchStep& step, char* workspace) {
    const TangoDecodeShape& shape = step.shape;
    size_t used = 0;
    const auto add = [&](auto*& pointer, size_t count) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(workspace + used);
        used += (count * sizeof(*pointer) + kAlignment - 1) / kAlignment * kAlignment;
    };
    const BatchPartition &qkv = step.partitions[kQkv], &out = step.partitions[kOut], &down = step.partitions[kDown];
    const size_t tiles = std::max(out.tiles, down.tiles), chunk_heads = kSequences * kMaxBatchChunks * shape.heads;
    add(step.arrived_blocks, 1);
    add(step.finished_blocks, 1);
    add(step.arrived_parts, std::max<size_t>(tiles, kSequences * shape.kv_heads));
    add(step.residual, kSequences * shape.hidden_size);
    add(step.squares, kSequences * tiles);
    add(step.qkv, static_cast<size_t>(kSequences) * qkv.split_k * qkv.columns);
    add(step.chunk_out, chunk_heads * shape.head_dim);
    add(step.softmax, chunk_heads);
    add(step.attn_out, kSequences * step.attn_width());
    add(step.residual_delta, static_cast<size_t>(kSequences) * std::max(out.split_k, down.split_k) * shape.hidden_size);
    add(step.hidden, kSequences * shape.intermediate);
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
    if (status == TANGO_OK) status = check_pointer("sequences", sequences, 8);
    if (status == TANGO_OK) status = check_ranges({{"count", count, 1, kSequences}});
    if (status == TANGO_OK) status = check_pointer("workspace", workspace, kAlignment);
    for (int i = 0; status == TANGO_OK && i < count; ++i) status = add_sequence(step, sequences[i]);
    if (status != TANGO_OK) return status;
    const size_t needed = lay_out(step, static_cast<char*>(workspace));
    if (workspace_bytes < needed)
        return fail(TANGO_SMALL_WORKSPACE, "workspace has %zu bytes: it must have %zu", workspace_bytes, needed);
    step.tensors = *tensors;
    const size_t shared = reinterpret_cast<size_t>(BatchShared(step, nullptr).end);
    const auto kernel = shape->quantized ? decode_batch<true> : decode_batch<false>;
    const auto grid_stream = static_cast<cudaStream_t>(stream);
    return cuda_status(launch_cooperative(kernel, step, step.shape.blocks, kBlock, shared, grid_stream), "decode");
}
