// Attention of a vision tower (tango/vision_attention.h) on mma.sync, for every architecture.
//
// A group is what attends to each other: the tokens of a frame, or those of one of its windows. Each block of
// vision_attention() handles some query rows of one head of a group, and goes over the group's keys tile by tile, as
// prefill.cu does over its cache.
#include "attention/vision.cuh"

#include <climits>

#include "common/check.h"
#include "common/device.h"

namespace tango {
namespace {

// What a block works on. Zeros pad a head_dim to the next one that has a kernel.
template <int kHeadDim, int kFragmentsPerWarp>
struct Tile {
    static constexpr int kWidth = kHeadDim, kFragments = kFragmentsPerWarp;  // a fragment is 16 query rows
    static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kRows = kWarps * kFragments * 16;
    static constexpr int kKeys = 64;
    static constexpr int kVectors = kWidth / Half8::kSize;
    static constexpr int kPitch = (kVectors | 1) * 16;  // bytes of a row in shared memory
    static constexpr int kQueryBytes = kRows * kPitch, kTileBytes = kKeys * kPitch;
    static constexpr int kBytes = kQueryBytes + 4 * kTileBytes;  // keys and values, double-buffered

    // An odd pitch: the vectors of one column in eight adjacent rows are in different banks.
    __device__ static uint32_t offset(int row, int vector) { return row * kPitch + vector * 16; }
};

// Rows past the last one repeat it.
template <typename T>
__device__ inline void load_queries(const VisionPass& pass, const Group& group, int head, int first,
                                    unsigned char* to) {
    const int vectors = pass.shape.head_dim / Half8::kSize;
    for (int i = threadIdx.x; i < T::kRows * T::kVectors; i += T::kThreads) {
        const int r = i / T::kVectors, vector = i % T::kVectors;
        if (vector >= vectors) continue;
        const int token = group.token(min(first + r, group.size - 1));
        *reinterpret_cast<Half8*>(to + T::offset(r, vector)) = pass.biased_query(token, head, vector);
    }
}

// Starts copying a tile of keys, followed by the values. Rows past the last one repeat it.
template <typename T>
__device__ inline void copy_tile(const VisionPass& pass, const Group& group, int head, int first, SharedAddress to) {
    const int vectors = pass.shape.head_dim / Half8::kSize;
    for (int i = threadIdx.x; i < T::kKeys * T::kVectors; i += T::kThreads) {
        const int r = i / T::kVectors, vector = i % T::kVectors;
        if (vector >= vectors) continue;
        const int token = group.token(min(first + r, group.size - 1));
        copy_async(to + T::offset(r, vector), pass.key(token, head, vector));
        copy_async(to + T::kTileBytes + T::offset(r, vector), pass.value(token, head, vector));
    }
}

// Masks the keys past the last one; `first` is that of the tile.
template <typename T>
__device__ inline void mask(Scores<T>& scores, int first, int size) {
#pragma unroll
    for (int m = 0; m < T::kFragments; ++m)
#pragma unroll
        for (int n = 0; n < T::kKeys / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (first + 8 * n + lane_id() % 4 * 2 + i % 2 >= size) scores[m][n][i] = -INFINITY;
}

template <typename T>
__device__ inline void write_rows(const VisionPass& pass, const Group& group, const RowState<T>& rows, int head,
                                  int first) {
#pragma unroll
    for (int m = 0; m < T::kFragments; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float sum = quad_sum(rows.row_sum[m][i]);
            const int row = first + 16 * m + lane_id() / 4 + 8 * i;
            if (row >= group.size) continue;
            __half2* to = pass.output(group.token(row), head);
#pragma unroll
            for (int n = 0; n < T::kWidth / 8; ++n) {
                const int d = 8 * n + lane_id() % 4 * 2;
                if (d >= pass.shape.head_dim) break;
                const float2 bias = pass.value_bias(head, d);
                to[d / 2] = __floats2half2_rn(rows.attn_out[m][n][2 * i] / sum + bias.x,
                                              rows.attn_out[m][n][2 * i + 1] / sum + bias.y);
            }
        }
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads) vision_attention(VisionPass pass) {
    unsigned char* shared = reinterpret_cast<unsigned char*>(shared_memory());
    const SharedAddress base = shared_address(shared);
    const int tiles_per_group = ceil_div(pass.largest_group(), T::kRows);
    const int first = blockIdx.x % tiles_per_group * T::kRows;
    const int head = blockIdx.x / tiles_per_group % pass.shape.heads;
    const Group group = pass.group(blockIdx.x / tiles_per_group / pass.shape.heads);
    if (first >= group.size) return;
    if (pass.shape.head_dim < T::kWidth) {
        for (int i = threadIdx.x; i < T::kBytes / 16; i += T::kThreads) shared_memory()[i] = make_float4(0, 0, 0, 0);
        __syncthreads();
    }
    copy_tile<T>(pass, group, head, 0, base + T::kQueryBytes);
    copy_commit();
    load_queries<T>(pass, group, head, first, shared);
    const int row = warp_id() * T::kFragments * 16;
    RowState<T> rows;
    const int tiles = ceil_div(group.size, T::kKeys);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        copy_wait<0>();
        __syncthreads();  // the tile is complete, and no thread reads the one before any more
        const SharedAddress keys = base + T::kQueryBytes + tile % 2 * 2 * T::kTileBytes;
        if (tile + 1 < tiles)
            copy_tile<T>(pass, group, head, (tile + 1) * T::kKeys,
                         base + T::kQueryBytes + (tile + 1) % 2 * 2 * T::kTileBytes);
        copy_commit();
        if (first + row >= group.size) continue;
        Scores<T> scores = {};
        compute_qk<T>(scores, base, keys, row);
        if ((tile + 1) * T::kKeys > group.size) mask<T>(scores, tile * T::kKeys, group.size);
        update_softmax<T>(scores, rows, pass.scale);
        accumulate_pv<T>(rows, scores, keys + T::kTileBytes);
    }
    write_rows<T>(pass, group, rows, head, first + row);
}

template <typename T>
cudaError_t launch_attention(const VisionPass& pass, cudaStream_t stream) {
    const int blocks = pass.groups() * pass.shape.heads * ceil_div(pass.largest_group(), T::kRows);
    return launch(vision_attention<T>, pass, blocks, T::kThreads, T::kBytes, stream);
}

// Large tiles read less shared memory per row. Small tiles waste less where a group has few rows.
template <int kWidth>
cudaError_t launch_attention(const VisionPass& pass, const DeviceProperties& gpu, cudaStream_t stream) {
    using Large = Tile<kWidth, (kWidth > 80) ? 1 : 2>;
    const bool many = pass.largest_group() > Large::kRows && Large::kBytes <= gpu.shared_bytes;
    return many ? launch_attention<Large>(pass, stream) : launch_attention<Tile<kWidth, 1>>(pass, stream);
}

cudaError_t launch_attention(const VisionPass& pass, cudaStream_t stream) {
    DeviceProperties gpu;
    const cudaError_t error = query_device(gpu);
    if (error != cudaSuccess) return error;
#ifdef TANGO_SM90A
    constexpr int kLeastRows = 128;  // of a group: fewer would leave warpgroups idle
    if (gpu.major == 9 && pass.largest_group() >= kLeastRows)
        return vision_attention_sm90(pass, gpu.sms, stream);
#endif
    if (pass.shape.head_dim <= 64) return launch_attention<64>(pass, gpu, stream);
    if (pass.shape.head_dim <= 80) return launch_attention<80>(pass, gpu, stream);
    return launch_attention<TANGO_MAX_VISION_HEAD_DIM>(pass, gpu, stream);
}

int check_shape(const TangoVisionAttentionShape& shape) {
    if (int status = check_ranges({{"frames", shape.frames, 1, INT_MAX},
                                   {"rows", shape.rows, 1, 1 << 15},
                                   {"columns", shape.columns, 1, 1 << 15},
                                   {"heads", shape.heads, 1, 1 << 10},
                                   {"head_dim", shape.head_dim, 8, TANGO_MAX_VISION_HEAD_DIM},
                                   {"head_dim % 8", shape.head_dim % 8, 0, 0},
                                   {"window", shape.window, 0, INT_MAX}}))
        return status;
    const int width = shape.heads * shape.head_dim;
    const long long tokens = 1LL * shape.rows * shape.columns;  // at most 2^30
    return check_ranges({{"frames * rows * columns", shape.frames * tokens, 1, INT_MAX / shape.heads},
                         {"query_stride", shape.query_stride, width, INT_MAX},
                         {"query_stride % 8", shape.query_stride % 8, 0, 0},
                         {"key_stride", shape.key_stride, width, INT_MAX},
                         {"key_stride % 8", shape.key_stride % 8, 0, 0},
                         {"value_stride", shape.value_stride, width, INT_MAX},
                         {"value_stride % 8", shape.value_stride % 8, 0, 0}});
}

int check_tensors(const TangoVisionAttentionTensors& tensors) {
    const struct {
        const char* name;
        const void* pointer;
    } all[] = {{"query", tensors.query}, {"key", tensors.key}, {"value", tensors.value}, {"attn_out", tensors.attn_out}};
    for (const auto& tensor : all)
        if (int status = check_pointer(tensor.name, tensor.pointer, 16)) return status;
    return tensors.bias == nullptr ? TANGO_OK : check_pointer("bias", tensors.bias, 16);
}

}  // namespace
}  // namespace tango

int tango_vision_attention_enqueue(const TangoVisionAttentionShape* shape, const TangoVisionAttentionTensors* tensors,
                                   void* stream) {
    using namespace tango;
    if (int status = check_pointer("shape", shape, 1)) return status;
    if (int status = check_pointer("tensors", tensors, 1)) return status;
    if (int status = check_shape(*shape)) return status;
    if (int status = check_tensors(*tensors)) return status;
    VisionPass pass{*shape, *tensors};
    pass.window_rows = shape->window == 0 ? shape->rows : min(shape->window, shape->rows);
    pass.window_columns = shape->window == 0 ? shape->columns : min(shape->window, shape->columns);
    pass.scale = kLog2E / sqrtf(static_cast<float>(shape->head_dim));
    return cuda_status(launch_attention(pass, static_cast<cudaStream_t>(stream)), "vision attention");
}
