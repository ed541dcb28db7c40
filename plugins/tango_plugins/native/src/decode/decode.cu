// A step of decoding as one kernel. Its blocks, one on each multiprocessor, go through the layers together: five phases
// a layer, and after each all wait for all. What crosses from phase to phase lies in the L2 cache; the residual stream
// is kept by every block for itself, in fp32.
#include <algorithm>
#include <climits>
#include <type_traits>

#include "attend.cuh"
#include "check.h"

namespace tango {
namespace {

constexpr int kLeastPositions = 32;   // that are worth a block of their own
constexpr int kUsualChunks = 12;      // of a sequence, for the choice of slices
constexpr int kMostRows = 8192;       // of a slice: its input is in shared memory
constexpr int kSliceCost = 64;        // sectors that could be read while one more slice is added up
constexpr int kSectorBytes = kSector * sizeof(__half);
constexpr size_t kAlignment = 256;

// The last block to end the step leaves the counters as it found them.
__device__ void finish(const Step& step) {
    if (threadIdx.x != 0 || atomicAdd(step.finished, 1u) != gridDim.x - 1) return;
    *step.arrived = 0;
    *step.finished = 0;
}

__device__ float block_sum(float value, float* of_warp) {
    value = warp_sum(value);
    if (lane_id() == 0) of_warp[warp_id()] = value;
    sync_threads();
    value = warp_sum(lane_id() < kWarps ? of_warp[lane_id()] : 0.0f);
    sync_threads();
    return value;
}

// residual += branch, by every block alike; input = its root-mean-square norm.
__device__ void normalise(const Step& step, int slices, const Shared& shared) {
    const int width = step.shape.width;
    float squares = 0.0f;
#pragma unroll 1
    for (int i = 4 * threadIdx.x; i < width; i += 4 * kThreads) {
        float4 x = *reinterpret_cast<float4*>(shared.residual + i);
        add_slices(x, step.branch + i, slices, width);
        *reinterpret_cast<float4*>(shared.residual + i) = x;
        squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    }
    const float scale = rsqrtf(block_sum(squares, shared.sums) / width + step.shape.norm_eps);
#pragma unroll 1
    for (int i = threadIdx.x; i < width; i += kThreads) shared.input[i] = shared.residual[i] * scale * shared.norm[i];
    sync_threads();
}

__device__ void load_hidden(const Step& step, float* input, int row, int rows) {
#pragma unroll 8
    for (int r = threadIdx.x; r < rows; r += kThreads) input[r] = __ldcg(step.hidden + row + r);
    sync_threads();
}

__device__ float silu(float x) { return x / (1.0f + expf(-x)); }

// Begins a product of a layer, and beside it the next copies that depend on no other block.
__device__ Product begin(const Step& step, const Shared& shared, int kind, int l) {
    const TangoDecodeLayer& layer = shared.layers[l % 2];
    const void *first = step.tensors.head, *second = nullptr;
    if (kind == kQkv) first = layer.qkv;
    if (kind == kOut) {
        first = layer.out;
        copy_ahead(shared.norm, layer.mlp_norm, step.shape.width);
    }
    if (kind == kMlp) {
        first = layer.gate, second = layer.up;
        if (l + 1 < step.shape.layers) copy_ahead(&shared.layers[(l + 1) % 2], step.tensors.layers + l + 1, 1);
    }
    if (kind == kDown) {
        first = layer.down;
        const bool last = l + 1 == step.shape.layers;
        copy_ahead(shared.norm, last ? step.tensors.norm : shared.layers[(l + 1) % 2].attention_norm, step.shape.width);
    }
    return Product(shared.share[kind], shared.ring, first, second);
}

// The phase between the first two products of a layer: attention over all chunks of all heads of the cache.
__device__ void attention(const Step& step, const Shared& shared, int l) {
    const int items = step.shape.kv_heads * step.chunks;
    const __half* bias = static_cast<const __half*>(shared.layers[l % 2].qkv_bias);
    for (int i = 16 * threadIdx.x; i < step.share[kQkv].columns; i += 16 * kThreads)
        prefetch(bias + i);
    Attention at(step, shared, l, blockIdx.x);
    if (static_cast<int>(blockIdx.x) < items) at.copy_first_tile(step);
    barrier::wait();
#pragma unroll 1
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
        if (i != static_cast<int>(blockIdx.x)) {
            at = Attention(step, shared, l, i);
            at.copy_first_tile(step);
        }
        attend(step, shared, at, bias);
    }
    barrier::arrive();
}

__global__ void __launch_bounds__(kBlock, 1) decode(const Step step) {
    const TangoDecodeShape& shape = step.shape;
    const Shared shared(step, shared_memory());
    if (threadIdx.x >= kThreads) {
        keep_in_step(step.arrived, (kHead + 1) * shape.layers);
        return;
    }
    const __half* embedding = static_cast<const __half*>(step.tensors.embedding);
    for (int i = threadIdx.x; i < shape.width; i += kThreads) shared.residual[i] = __half2float(embedding[i]);
    tabulate(step, shared.rotation);
    if (threadIdx.x < kProducts) shared.share[threadIdx.x] = step.share[threadIdx.x];
    copy_ahead(shared.layers, step.tensors.layers, 1);
    copy_wait<0>();
    sync_threads();
    copy_ahead(shared.norm, shared.layers[0].attention_norm, shape.width);
    copy_wait<0>();
    sync_threads();
    // One loop over all products, and not one after the other in a layer: the code stays small enough for its cache.
#pragma unroll 1
    for (int turn = 0; turn <= kHead * shape.layers; ++turn) {
        const int l = turn / kHead, kind = l < shape.layers ? turn % kHead : kHead;
        if (kind == kOut) attention(step, shared, l);
        Product product = begin(step, shared, kind, l);
        if (turn > 0) barrier::wait();
        const float* input = shared.input;
        if (kind == kOut) {
            combine(step, shared.input, reinterpret_cast<float2*>(shared.sums), product.row(), product.rows());
        } else if (kind == kDown) {
            load_hidden(step, shared.input, product.row(), product.rows());
        } else {
            normalise(step, turn == 0 ? 0 : shared.share[kind == kMlp ? kOut : kDown].slices, shared);
            input += product.row();
        }
        float* to = kind == kQkv ? step.packed : kind == kHead ? step.tensors.logits : step.branch;
        const int columns = kind == kHead ? shape.vocabulary : shared.share[kind].columns;
        product.run(input, shared.sums, [&](int column, int slice, const float* sum) {
            if (kind == kMlp)
                __stcg(step.hidden + column, silu(sum[0]) * sum[shared.share[kMlp].strip]);
            else if (column < columns)
                __stcg(to + slice * columns + column, *sum);
        });
        if (kind != kHead) barrier::arrive();
    }
    finish(step);
}

// Shares a product out among the blocks so that the one with the most to read, weights and input, has little more than
// the others. `input_bytes` are read for each row, by every block; 0 where a block needs all rows in any case.
Share share_out(int matrices, int rows, int columns, int input_bytes, int blocks, int most_slices) {
    const int sectors = columns / kSector, widest = kMostVectors / matrices * kVector / kSector;
    long long least = LLONG_MAX;
    Share best = {matrices, rows, columns};
    for (int slices = 1; slices <= std::min(most_slices, blocks); ++slices) {
        const int slice = ceil_div(ceil_div(rows, slices), kSector) * kSector, beside = blocks / slices;
        const int rounds = ceil_div(sectors, beside * widest), strip = ceil_div(sectors, beside * rounds);
        if (slices > 1 && rounds > 1) break;  // a block has the input of one slice
        long long cost = 1LL * slice * (strip * rounds * matrices * kSectorBytes + input_bytes) / kSectorBytes;
        cost += slices * kSliceCost;
        if (slice > kMostRows) cost += 1LL << 40;  // only where there is no other way
        if (cost >= least) continue;
        least = cost;
        best.strip = strip * kSector;
        best.strips = ceil_div(sectors, strip);
        best.slice = slice;
        best.slices = ceil_div(rows, slice);
    }
    best.vectors = matrices * best.strip / kVector;
    best.groups = kThreads / best.vectors;
    return best;
}

int failed(cudaError_t error) {
    return fail(TANGO_CUDA_ERROR, "%s (%s)", cudaGetErrorString(error), cudaGetErrorName(error));
}

// Shared memory of a block, in bytes.
size_t shared_bytes(const Step& step) {
    const Shared shared(step, nullptr);
    return reinterpret_cast<size_t>(shared.state + step.shape.heads / step.shape.kv_heads);
}

// Everything about a step but its pointers and its position.
Step describe(const TangoDecodeShape& shape) {
    Step step = {};
    step.shape = shape;
    const int mixed = shape.heads * shape.head_width, packed = mixed + 2 * shape.kv_heads * shape.head_width;
    const int chunks = kUsualChunks * static_cast<int>(sizeof(float)), one = sizeof(float), blocks = shape.blocks;
    step.share[kQkv] = share_out(1, shape.width, packed, 0, blocks, kMostSlices);
    step.share[kOut] = share_out(1, mixed, shape.width, chunks, blocks, kMostSlices);
    step.share[kMlp] = share_out(2, shape.width, shape.intermediate, 0, blocks, 1);
    step.share[kDown] = share_out(1, shape.intermediate, shape.width, one, blocks, kMostSlices);
    step.share[kHead] = share_out(1, shape.width, shape.head_columns, 0, blocks, 1);
    step.tile = std::min(kMostTile, kRingBytes / 2 / (shape.head_width * static_cast<int>(sizeof(__half))));
    step.lanes = 1;
    while (step.lanes * kVector < shape.head_width) step.lanes *= 2;
    const int queries = shape.heads / shape.kv_heads * step.lanes * kVector;
    step.input_floats = ceil_div(std::max({shape.width, mixed, queries, step.share[kDown].slice}), 4) * 4;
    return step;
}

int most_chunks(const Step& step) {
    return std::max(1, std::min(step.shape.blocks / step.shape.kv_heads, kSumFloats / 2 / step.shape.heads));
}

// Sets the step's pointers into a workspace; gives its size.
size_t lay_out(Step& step, char* workspace) {
    const TangoDecodeShape& shape = step.shape;
    size_t used = 0;
    const auto take = [&](auto*& pointer, size_t count) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(workspace + used);
        used += (count * sizeof(*pointer) + kAlignment - 1) / kAlignment * kAlignment;
    };
    const size_t heads = static_cast<size_t>(most_chunks(step)) * shape.heads;
    take(step.arrived, 1);
    take(step.finished, 1);
    take(step.packed, static_cast<size_t>(step.share[kQkv].slices) * step.share[kQkv].columns);
    take(step.mixed, heads * shape.head_width);
    take(step.weight, heads);
    take(step.branch, static_cast<size_t>(std::max(step.share[kOut].slices, step.share[kDown].slices)) * shape.width);
    take(step.hidden, shape.intermediate);
    return used;
}

int check(const TangoDecodeShape* shape) {
    if (shape == nullptr) return fail(TANGO_BAD_ARGUMENT, "shape is null");
    const int status = check_ranges({
        {"layers", shape->layers, 1, 1024},
        {"width", shape->width, 16, 16384},
        {"heads", shape->heads, 1, 1024},
        {"kv_heads", shape->kv_heads, 1, shape->heads},
        {"head_width", shape->head_width, 16, 256},
        {"intermediate", shape->intermediate, 16, 65536},
        {"head_columns", shape->head_columns, 16, 1 << 24},
        {"vocabulary", shape->vocabulary, 1, shape->head_columns},
        {"capacity", shape->capacity, 1, 1 << 20},
    });
    if (status != TANGO_OK) return status;
    const struct {
        const char* name;
        int value;
    } widths[] = {{"width", shape->width},
                  {"head_width", shape->head_width},
                  {"intermediate", shape->intermediate},
                  {"head_columns", shape->head_columns}};
    for (const auto& width : widths)
        if (width.value % kSector != 0)
            return fail(TANGO_BAD_ARGUMENT, "%s is %d: it must be a multiple of %d", width.name, width.value, kSector);
    if (shape->heads % shape->kv_heads != 0)
        return fail(TANGO_BAD_ARGUMENT, "heads is %d: it must be a multiple of kv_heads, %d", shape->heads,
                    shape->kv_heads);
    const int queries = shape->heads / shape->kv_heads * shape->head_width;
    if (queries > kSumFloats)
        return fail(TANGO_BAD_ARGUMENT, "queries of one head of the cache are %d wide: they may be %d", queries,
                    kSumFloats);
    return TANGO_OK;
}

int check(const TangoDecodeTensors* tensors) {
    if (tensors == nullptr) return fail(TANGO_BAD_ARGUMENT, "tensors is null");
    int status = check_pointer("layers", tensors->layers, 16);
    if (status == TANGO_OK) status = check_pointer("frequencies", tensors->frequencies, 4);
    if (status == TANGO_OK) status = check_pointer("norm", tensors->norm, 16);
    if (status == TANGO_OK) status = check_pointer("head", tensors->head, 16);
    if (status == TANGO_OK) status = check_pointer("embedding", tensors->embedding, 2);
    if (status == TANGO_OK) status = check_pointer("logits", tensors->logits, 4);
    return status;
}

// Checks a shape and says how a step of it goes on the current device.
int prepare(const TangoDecodeShape* shape, Step& step) {
    int status = check(shape);
    if (status != TANGO_OK) return status;
    int device, multiprocessors = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return failed(error);
    status = check_ranges({{"blocks", shape->blocks, 0, multiprocessors}});
    if (status != TANGO_OK) return status;
    TangoDecodeShape placed = *shape;
    if (placed.blocks == 0) placed.blocks = multiprocessors;
    step = describe(placed);
    if (shared_bytes(step) > static_cast<size_t>(most))
        return fail(TANGO_BAD_ARGUMENT, "a block would need %zu bytes of shared memory, this GPU has %d",
                    shared_bytes(step), most);
    return TANGO_OK;
}

}  // namespace
}  // namespace tango

using namespace tango;

int tango_decode_workspace(const TangoDecodeShape* shape, size_t* bytes) {
    Step step;
    const int status = prepare(shape, step);
    if (status != TANGO_OK) return status;
    if (bytes == nullptr) return fail(TANGO_BAD_ARGUMENT, "bytes is null");
    *bytes = lay_out(step, nullptr);
    return TANGO_OK;
}

int tango_decode_enqueue(const TangoDecodeShape* shape, const TangoDecodeTensors* tensors, int32_t position,
                         void* workspace, size_t workspace_bytes, void* stream) {
    Step step;
    int status = prepare(shape, step);
    if (status == TANGO_OK) status = check(tensors);
    if (status == TANGO_OK) status = check_ranges({{"position", position, 0, shape->capacity - 1}});
    if (status == TANGO_OK) status = check_pointer("workspace", workspace, kAlignment);
    if (status != TANGO_OK) return status;
    const size_t needed = lay_out(step, static_cast<char*>(workspace)), shared = shared_bytes(step);
    if (workspace_bytes < needed)
        return fail(TANGO_SMALL_WORKSPACE, "workspace has %zu bytes: it must have %zu", workspace_bytes, needed);
    step.tensors = *tensors;
    step.position = position;
    step.chunk = ceil_div(position + 1, std::min(ceil_div(position + 1, kLeastPositions), most_chunks(step)));
    step.chunks = ceil_div(position + 1, step.chunk);
    const cudaError_t error =
        launch_together(decode, step, step.shape.blocks, shared, static_cast<cudaStream_t>(stream));
    return error == cudaSuccess ? TANGO_OK : failed(error);
}
