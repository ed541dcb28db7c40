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

#include "batch_attention.cuh"
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
    sync_batch();
    return *is_last;
}

// The residual stream begins with the embeddings, and the rotary angles are the same in all layers; a block per
// sequence.
__device__ void embed(const BatchStep& step, const float* norm, float* warp_sums) {
    const int hidden_size = step.shape.hidden_size;
    for (int s = blockIdx.x; s < step.count; s += gridDim.x) {
        const int half = step.shape.head_dim / 2;
        for (int d = threadIdx.x; d < half; d += kBatchThreads) {
            float2 angle;
            sincosf(step.sequences[s].rotation * step.tensors.frequencies[d], &angle.y, &angle.x);
            __stcg(step.rope + s * half + d, angle);
        }
        float squares = 0.0f;
        for (int i = threadIdx.x; i < hidden_size; i += kBatchThreads) {
            const float x = __half2float(step.sequences[s].embedding[i]);
            __stcg(step.residual + s * hidden_size + i, x);
            __stcg(step.normed + s * hidden_size + i, x * norm[i]);
            squares += x * x;
        }
        squares = warp_sum(squares);
        if (lane_id() == 0) warp_sums[warp_id()] = squares;
        sync_batch();
        if (warp_id() == 0) {
            squares = warp_sum(lane_id() < kBatchWarps ? warp_sums[lane_id()] : 0.0f);
            if (lane_id() == 0) __stcg(step.squares + s, squares);
        }
        sync_batch();
    }
}

// Adds the splits of kOut or kDown to the columns of a part of the residual stream, and multiplies it by the weights of
// the next norm. All of it goes through shared memory, which is free, so that it is read at once.
__device__ void add_to_residual(const BatchStep& step, float* memory, const float* norm, int splits,
                                const BatchPart& part) {
    constexpr int kColumns = 256;
    const int count = step.count, hidden_size = step.shape.hidden_size, s = warp_id();
    float squares = 0.0f;
#pragma unroll 1
    for (int first = 0; first < part.columns(); first += kColumns) {
        const int columns = min(kColumns, part.columns() - first), column = part.column() + first;
        // A row is that of a sequence in a split, or in the residual stream, or the norm.
        const int rows = (splits + 1) * count;
#pragma unroll 1
        for (int row = warp_id(); row <= rows; row += kBatchWarps) {
            const int split = row / count, of = row - split * count;
            const float* from = step.residual + of * hidden_size;
            if (split < splits) from = step.residual_delta + (split * kSequences + of) * hidden_size;
            if (row == rows) from = norm;
            for (int i = 4 * lane_id(); i < columns; i += 4 * kWarp)
                copy_async(shared_address(memory + row * kColumns + i), from + column + i);
        }
        copy_commit();
        copy_wait<0>();
        sync_batch();
#pragma unroll 1
        for (int i = 4 * lane_id(); i < columns && s < count; i += 4 * kWarp) {
            const auto at = [&](int row) { return *reinterpret_cast<const float4*>(memory + row * kColumns + i); };
            float4 x = at(splits * count + s);
#pragma unroll 4
            for (int split = 0; split < splits; ++split) x = x + at(split * count + s);
            const float4 weights = at(rows);
            const int to = s * hidden_size + column + i;
            __stcg(reinterpret_cast<float4*>(step.residual + to), x);
            __stcg(reinterpret_cast<float4*>(step.normed + to),
                   make_float4(x.x * weights.x, x.y * weights.y, x.z * weights.z, x.w * weights.w));
            squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
        }
        sync_batch();
    }
    squares = warp_sum(squares);
    if (lane_id() == 0 && s < count) __stcg(step.squares + part.tile() * kSequences + s, squares);
}

// What the input of each sequence is multiplied by: a sixteenth, and the factor of its norm, from some sums of squares,
// if there are any. A warp per sequence.
__device__ void compute_scales(const BatchStep& step, float* scales, int sums) {
    static_assert(kBatchWarps == kSequences);
    const int s = warp_id();
    float squares = 0.0f, scale = 1.0f / kInputScale;
#pragma unroll 2
    for (int i = lane_id(); i < sums && s < step.count; i += kWarp)
        squares += __ldcg(step.squares + i * kSequences + s);
    squares = warp_sum(squares);
    if (sums > 0) scale *= rsqrtf(squares / step.shape.hidden_size + step.shape.norm_eps);
    if (lane_id() == 0) scales[s] = scale;
}

// The input of a GEMV: rows [row, row + rows) of `from` [sequences, width].
struct Input {
    const float* from;
    int width, row, rows;
    int distance;  // of the pairs of rows of a lane, see first_row()
    float odd;     // factor of every other row, whose weights are that much too large

    // Matrices that lie by columns have the order of PackedInts.
    __device__ bool is_for_columns() const { return distance != kRowDistance; }

    __device__ int units() const { return input_units(rows); }

    // A lane's part of a fragment is two pairs of rows, the first from here on.
    __device__ int first_row(int fragment) const {
        const int t = lane_id() % 4;
        return is_for_columns() ? fragment / 2 * kUnit + t * 8 + fragment % 2 * (8 / distance)
                                : fragment * kFragmentRows + t * 2;
    }
};

// Starts copying an input to where its fragments will be. What fills it up, and sequences that are not there, are zero.
// A warp has both fragments of a unit.
__device__ void copy_input(const Input& input, int count, Fragment* fragments) {
    const int s = lane_id() / 4;
    const float* const own = input.from + s * input.width + input.row;
#pragma unroll 2
    for (int unit = warp_id(); unit < input.units(); unit += kBatchWarps)
#pragma unroll
        for (int i = 2 * unit; i < 2 * unit + 2; ++i) {
            Fragment* const to = fragments + i * kWarp + lane_id();
            const int r = input.first_row(i);
            if (r < input.rows && s < count) {
                copy_async_pair(shared_address(to), own + r);
                copy_async_pair(shared_address(&to->z), own + r + input.distance);
            } else {
                *to = {};
            }
        }
    copy_commit();
}

// Makes fragments of it for matrices that lie by columns, of what the thread has copied itself, and the sums of units.
__device__ void make_fragments(const Input& input, const BatchInput& to) {
    const float scale = to.scales[lane_id() / 4];
#pragma unroll 2
    for (int unit = warp_id(); unit < input.units(); unit += kBatchWarps) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 2 * unit; i < 2 * unit + 2; ++i) {
            Fragment& own = to.fragments[i * kWarp + lane_id()];
            const float4 copied = *reinterpret_cast<const float4*>(&own);
            const float4 x = make_float4(copied.x * scale, copied.y * scale, copied.z * scale, copied.w * scale);
            sum += x.x + x.y + x.z + x.w;
            own = make_fragment(x.x, x.z, x.y * input.odd, x.w * input.odd);
        }
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (lane_id() % 4 == 0) to.unit_sums[unit * kSequences + lane_id() / 4] = sum * kSubnormal;
    }
    sync_batch();
}

// The GEMV at an index of the sequence of all GEMVs.
struct Phase {
    int layer, gemv;

    __device__ Phase(int index, int layers)
        : layer(index / kLmHead), gemv(layer < layers ? index % kLmHead : kLmHead) {}
};

// How many sums of squares there are for the norm of a GEMV's input, 0 if it has none.
__device__ int squares_of(const BatchPartition* partitions, const Phase& phase) {
    if (phase.gemv == kOut || phase.gemv == kDown) return 0;
    if (phase.gemv == kQkv && phase.layer == 0) return 1;
    return partitions[phase.gemv == kGateUp ? kOut : kDown].tiles;
}

// Prepares the input of a GEMV in shared memory, the rows that the block needs.
__device__ void prepare_input(const BatchStep& step, const BatchShared& shared, const Phase& phase,
                              const BatchPart& part) {
    const BatchPartition& partition = shared.partitions[phase.gemv];
    Input input = {step.normed, partition.rows, part.row(), part.rows(), kRowDistance, 1.0f};
    if (phase.gemv == kOut) input.from = step.attn_out;
    if (phase.gemv == kDown) input.from = step.hidden;
    const int form = shared.matrix(phase.layer, phase.gemv).weights;
    if (form == TANGO_WEIGHTS_BLOCKS_4) {
        input.distance = PackedInts<4>::kDistance;
        input.odd = 1.0f / PackedInts<4>::kOdd;
    } else if (form > TANGO_WEIGHTS_BLOCKS_4) {
        input.distance = PackedInts<8>::kDistance;
    }
    const BatchInput to = shared.input_of(partition);
    copy_input(input, step.count, to.fragments);
    compute_scales(step, shared.scales, squares_of(shared.partitions, phase));
    copy_wait<0>();
    sync_batch();
    if (input.is_for_columns()) make_fragments(input, to);
}

// Starts copying the addresses of a layer.
__device__ void copy_layer(const BatchStep& step, const BatchShared& shared, int layer) {
    const int at = 16 * threadIdx.x;
    if (at < static_cast<int>(sizeof(TangoDecodeLayer)))
        copy_async(shared_address(shared.layers + layer % 2) + at,
                   reinterpret_cast<const char*>(step.tensors.layers + layer) + at);
    copy_commit();
}

// Starts copies that depend on no other block, for later phases.
__device__ void copy_for_later(const BatchStep& step, const BatchShared& shared, const Phase& phase) {
    if (phase.gemv == kGateUp && phase.layer + 1 < step.shape.layers) copy_layer(step, shared, phase.layer + 1);
}

// The weights of the norm that follows a GEMV.
__device__ const float* next_norm(const BatchStep& step, const BatchShared& shared, const Phase& phase) {
    if (phase.gemv != kDown) return shared.layers[phase.layer % 2].mlp_norm;
    return phase.layer + 1 < step.shape.layers ? shared.layers[(phase.layer + 1) % 2].attention_norm
                                               : step.tensors.norm;
}

// Brings into the L2 cache what later phases read besides matrices.
__device__ void prefetch(const void* from, int bytes) {
    const int own = (blockIdx.x * kBatchThreads + threadIdx.x) * kSectorBytes;
    if (own < bytes) prefetch_l2(static_cast<const char*>(from) + own);
}

__device__ void prefetch_for_later(const BatchStep& step, const BatchShared& shared, const Phase& phase) {
    if (phase.gemv == kQkv) prefetch(shared.layers[phase.layer % 2].qkv_bias, step.partitions[kQkv].columns * 2);
    if (phase.gemv == kOut || phase.gemv == kDown)
        prefetch(next_norm(step, shared, phase), step.shape.hidden_size * static_cast<int>(sizeof(float)));
}

// Attention between kQkv and kOut: the blocks share all chunks of all KV heads of all sequences.
__device__ void attention(const BatchStep& step, const BatchShared& shared, int layer) {
    const __half* const bias = static_cast<const __half*>(shared.layers[layer % 2].qkv_bias);
    const AttentionShared own(step, shared.input);
    bool waits = true;
#pragma unroll 1
    for (int part = blockIdx.x; part < step.attention_parts; part += gridDim.x) {
        int s = 0;
        while (s + 1 < step.count && part >= step.sequences[s + 1].first_part) ++s;
        const BatchChunk chunk(step, s, layer, part);
        chunk.copy_first_tile(own);
        if (waits) BatchBarrier::wait();
        waits = false;
        attend(chunk, own, bias, step.rope + s * (step.shape.head_dim / 2));
        unsigned* const arrived = step.arrived_parts + s * step.shape.kv_heads + chunk.kv_head;
        if (all_arrived(arrived, chunk.sequence.kv_chunks, shared.is_last)) merge_parts(chunk);
    }
    if (waits) BatchBarrier::wait();
    BatchBarrier::arrive();
}

// Calls use(gemv) with the GEMV of a phase.
template <bool kQuantized, typename Use>
__device__ void with_gemv(const BatchPart& part, const Ring& ring, const TangoMatrix& first, const TangoMatrix& second,
                          Use use) {
    if (!kQuantized || first.weights == TANGO_WEIGHTS_FP16)
        use(BatchGemv<BatchRows<__half>>(part, ring, first, second));
    else if (first.weights == TANGO_WEIGHTS_INT8)
        use(BatchGemv<BatchRows<int8_t>>(part, ring, first, second));
    else if (first.weights == TANGO_WEIGHTS_BLOCKS_4)
        use(BatchGemv<BatchColumns<TANGO_WEIGHTS_BLOCKS_4>>(part, ring, first, second));
    else if (first.weights == TANGO_WEIGHTS_BLOCKS_8)
        use(BatchGemv<BatchColumns<TANGO_WEIGHTS_BLOCKS_8>>(part, ring, first, second));
    else
        use(BatchGemv<BatchColumns<TANGO_WEIGHTS_FP8>>(part, ring, first, second));
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
__global__ void __launch_bounds__(kBatchBlock, 1) decode_batch(const BatchStep step) {
    const TangoDecodeShape& shape = step.shape;
    BatchShared shared(step, shared_memory());
    if (threadIdx.x >= kBatchThreads) {
        BatchBarrier::run(step.arrived_blocks, (kLmHead + 1) * shape.layers + 1);
        return;
    }
    copy_layer(step, shared, 0);
    copy_wait<0>();
    sync_batch();
    embed(step, shared.layers[0].attention_norm, reinterpret_cast<float*>(shared.input));
    BatchBarrier::arrive();
    if (threadIdx.x < kGemvs) shared.partitions[threadIdx.x] = step.partitions[threadIdx.x];
    if (threadIdx.x == 0) *shared.head = step.tensors.head;
    sync_batch();
    // One loop over all GEMVs, as in decode.cu: the code has to fit the instruction cache.
#pragma unroll 1
    for (int index = 0; index <= kLmHead * shape.layers; ++index) {
        const Phase phase(index, shape.layers);
        shared = BatchShared(step, shared_memory() + opaque(0));
        if (phase.gemv == kOut) attention(step, shared, phase.layer);
        prefetch_for_later(step, shared, phase);
        copy_for_later(step, shared, phase);
        const BatchPartition& partition = shared.partitions[phase.gemv];
        const Ring ring = shared.ring_of(partition, step.shared_bytes);
        const TangoMatrix &first = shared.matrix(phase.layer, phase.gemv), &second = shared.layers[phase.layer % 2].up;
        const auto emit = [&](int column, int split, int s, float sum, float up) {
            store(step, phase.gemv, partition, column, split, s, sum, up);
        };
        bool waits = true;
#pragma unroll 1
        for (BatchPart part(partition); waits || part.is_valid(); part.advance()) {
            with_gemv<kQuantized>(part, ring, first, second, [&](auto gemv) {
                gemv.start();
                if (waits) {
                    BatchBarrier::wait();
                    prepare_input(step, shared, phase, part);
                }
                gemv.run(shared.input_of(partition), emit);
            });
            waits = false;
            if (!part.is_valid()) break;
            if (phase.gemv != kOut && phase.gemv != kDown) continue;
            if (all_arrived(step.arrived_parts + part.tile(), partition.split_k, shared.is_last))
                add_to_residual(step, reinterpret_cast<float*>(shared.input), next_norm(step, shared, phase),
                                partition.split_k, part);
        }
        if (phase.gemv != kLmHead) BatchBarrier::arrive();
    }
    finish(step);
}

// Partitions a GEMV so that the block with the most to read, weights and input, reads little more than the others. The
// input of a block has at most `max_rows` rows, and splits begin at multiples of `row_multiple`; split_k is 0 if there
// is no such way.
BatchPartition partition_gemv(int matrices, int rows, int columns, int blocks, int max_split_k, int max_rows,
                              int row_multiple) {
    const int tiles = columns / kTile;
    long long min_cost = LLONG_MAX;
    BatchPartition best = {matrices, rows, columns};
    for (int splits = 1; splits <= std::min(max_split_k, blocks); ++splits) {
        const int split_rows = ceil_div(ceil_div(rows, splits), row_multiple) * row_multiple,
                  blocks_per_split = blocks / splits;
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
    const size_t needed = reinterpret_cast<size_t>(BatchShared(step, nullptr).end);
    if (needed > shared_bytes) return step;
    constexpr int kInputBytes = kInputRows / kUnit * kUnitInputBytes;
    const int max_rows = static_cast<int>(shared_bytes - needed) / kInputBytes * kInputRows;
    const int row_multiple =
        shape.formats != TANGO_DECODE_FP16 ? kInputRows : kUnit;  // so that no step begins inside of a block
    const int hidden_size = shape.hidden_size, attn_out = step.attn_width();
    const int qkv = attn_out + 2 * shape.kv_heads * shape.head_dim;
    const auto partition = [&](int matrices, int rows, int columns, int max_split_k) {
        return partition_gemv(matrices, rows, columns, shape.blocks, max_split_k, max_rows, row_multiple);
    };
    step.partitions[kQkv] = partition(1, hidden_size, qkv, kMaxSplitK);
    step.partitions[kOut] = partition(1, attn_out, hidden_size, kMaxBatchSplitK);
    step.partitions[kGateUp] = partition(2, hidden_size, shape.intermediate, 1);
    step.partitions[kDown] = partition(1, shape.intermediate, hidden_size, kMaxBatchSplitK);
    step.partitions[kLmHead] = partition(1, hidden_size, shape.head_columns, 1);
    for (const BatchPartition& gemv : step.partitions)
        step.input_bytes = std::max(step.input_bytes, input_units(gemv.split_rows) * kUnitInputBytes);
    step.shared_bytes = static_cast<int>(shared_bytes) / 16 * 16;
    const auto attention_bytes = [&] {
        return reinterpret_cast<size_t>(AttentionShared(step, BatchShared(step, nullptr).input).end);
    };
    step.kv_tile_size = kMaxBatchKvTile;
    while (attention_bytes() > shared_bytes) step.kv_tile_size -= kWarp;  // what must be there is enough for some
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
    add(step.rope, kSequences * (shape.head_dim / 2));
    add(step.residual, kSequences * shape.hidden_size);
    add(step.normed, kSequences * shape.hidden_size);
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
    const auto kernel = shape->formats == TANGO_DECODE_FP16 ? decode_batch<false> : decode_batch<true>;
    const auto grid_stream = static_cast<cudaStream_t>(stream);
    return cuda_status(launch_cooperative(kernel, step, step.shape.blocks, kBatchBlock, step.shared_bytes, grid_stream),
                       "decode");
}
