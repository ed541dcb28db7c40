// Attention of a vision tower (tango/vision_attention.h) on mma.sync, for every architecture.
//
// A group is what attends to each other: the tokens of a frame, or those of one of its windows. Each block of
// vision_attention() handles some query rows of a group, for one head after the other. It goes over the keys of a head
// tile by tile, and copies the next tile meanwhile, also when that is the next head's. Small windows have one tile, so
// only several heads let a block copy and compute at the same time.
//
// Where it rotates, a group is one tile of queries and one of keys. A thread rotates, in shared memory, some dimensions
// of two queries and of their two keys, by angles that it keeps for all heads.
#include "attention/vision.cuh"

#include <climits>

#include "attention/rotation.cuh"

#include "common/check.h"
#include "common/device.h"

namespace tango {
namespace {

// What a block works on. Zeros pad a head_dim to the next one that has a kernel.
template <int kHeadDim, int kFragmentsPerWarp>
struct Tile {
    static constexpr int kWidth = kHeadDim, kFragments = kFragmentsPerWarp;  // a fragment is 16 query rows
    static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
    static constexpr int kWarpRows = kFragments * 16, kRows = kWarps * kWarpRows, kKeys = 64;
    static constexpr int kVectors = kWidth / Half8::kSize;
    // Bytes of a row in shared memory. It is odd in vectors: those of one column in eight adjacent rows are in
    // different banks.
    static constexpr int kPitch = (kVectors | 1) * 16;
    static constexpr int kValues = kKeys * kPitch, kTileBytes = 2 * kValues;  // keys, then values
    // After a head's queries come the biases: of queries, keys and values.
    static constexpr int kBias = kRows * kPitch, kKeyBias = kBias + kPitch, kValueBias = kKeyBias + kPitch;
    static constexpr int kQueryBytes = kValueBias + kPitch;

    // There are two tiles, the queries of a head, and, if a block has several, those of the next.
    __device__ static int tile(int step) { return step % 2 * kTileBytes; }
    __device__ static int queries(int head) { return 2 * kTileBytes + head % 2 * kQueryBytes; }
    __host__ __device__ static int bytes(int heads) { return 2 * kTileBytes + (heads > 1 ? 2 : 1) * kQueryBytes; }

    // Of an SM, whose shared memory holds as many; 0 leaves the number of registers to the compiler. Angles take many.
    template <bool kRotates>
    static constexpr int blocks() {
        return kRotates && kWidth <= 80 ? 3 : 0;
    }

    __device__ static uint32_t offset(int row, int vector) { return row * kPitch + vector * 16; }
};

// The argument of the kernel: a block has up to `heads` heads.
struct Pass : VisionPass {
    int heads;
};

// Zeros what no copy writes: dimensions that head_dim has not, and a bias that is not given.
template <typename T>
__device__ inline void clear_padding(const Pass& pass, int heads, unsigned char* shared) {
    const int vectors = pass.shape.head_dim / Half8::kSize, rows = T::bytes(heads) / T::kPitch;
    for (int i = threadIdx.x; i < rows; i += T::kThreads)
        for (int vector = vectors; vector < T::kVectors; ++vector) store(shared + T::offset(i, vector), Half8{});
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * 3 * vectors; i += T::kThreads) {
        const int part = i / 2 % 3, vector = i / 6;
        const TangoVisionAttentionTensors& tensors = pass.tensors;
        const void* bias = part == 0 ? tensors.query_bias : part == 1 ? tensors.key_bias : tensors.value_bias;
        unsigned char* const to = shared + T::queries(i % 2 % heads) + T::kBias + part * T::kPitch;
        if (bias == nullptr) store(to + vector * 16, Half8{});
    }
}

// Cosines and sines of the tokens whose rows a thread rotates: the warp's row of its lane / 4, and that + 8. Of a
// vector of eight dimensions it has the two of its lane % 4, and their partners half a head later.
template <typename T>
struct Angles {
    static constexpr int kVectors = T::kVectors / 2;  // the most that half a head has

    float2 cosines[2][kVectors], sines[2][kVectors];

    __device__ void load(const Pass& pass, const Group& group, int warp_first) {
        const int half = pass.shape.head_dim / 2, first = group.first % (pass.shape.rows * pass.shape.columns);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = min(warp_first + lane_id() / 4 + 8 * i, group.size - 1);
            const int at = (first + group.offset(row)) * half + lane_id() % 4 * 2;
#pragma unroll
            for (int v = 0; v < kVectors; ++v)
                if (v * Half8::kSize < half) {
                    cosines[i][v] = *reinterpret_cast<const float2*>(pass.tensors.cosines + at + v * Half8::kSize);
                    sines[i][v] = *reinterpret_cast<const float2*>(pass.tensors.sines + at + v * Half8::kSize);
                }
        }
    }

    // Adds the bias to the warp's rows, and rotates them.
    __device__ void rotate(const Pass& pass, unsigned char* rows, const unsigned char* bias) const {
        const int half = pass.shape.head_dim / 2, partner = half * sizeof(__half), column = lane_id() % 4 * 4;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if (v * Half8::kSize >= half) continue;
            const float2 low_bias = read(bias + v * 16 + column), high_bias = read(bias + v * 16 + column + partner);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                unsigned char* at = rows + T::offset(lane_id() / 4 + 8 * i, v) + column;
                float2 low = read(at), high = read(at + partner);
                low.x += low_bias.x, low.y += low_bias.y, high.x += high_bias.x, high.y += high_bias.y;
                rotate_pair(low.x, high.x, cosines[i][v].x, sines[i][v].x);
                rotate_pair(low.y, high.y, cosines[i][v].y, sines[i][v].y);
                *reinterpret_cast<__half2*>(at) = __floats2half2_rn(low.x, low.y);
                *reinterpret_cast<__half2*>(at + partner) = __floats2half2_rn(high.x, high.y);
            }
        }
    }

  private:
    __device__ static float2 read(const unsigned char* pair) {
        return __half22float2(*reinterpret_cast<const __half2*>(pair));
    }
};

// Adds the queries' bias to the rows of a warp.
template <typename T>
__device__ inline void add_bias(unsigned char* queries, int first) {
#pragma unroll
    for (int i = 0; i < T::kWarpRows * T::kVectors; i += kWarp) {
        const int at = i + lane_id(), vector = at / T::kWarpRows;
        unsigned char* query = queries + T::offset(first + at % T::kWarpRows, vector);
        store(query, biased(load(query), load(queries + T::kBias + vector * 16)));
    }
    __syncwarp();
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

// Writes the rows of a warp, by way of shared memory, where its queries were.
template <typename T>
__device__ inline void write_rows(const VisionPass& pass, const Group& group, const RowState<T>& rows, int head,
                                  int first, int warp_first, unsigned char* queries) {
    unsigned char* shared = queries + T::offset(warp_first, 0);
    float factor[T::kFragments][2];
#pragma unroll
    for (int m = 0; m < T::kFragments; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) factor[m][i] = 1.0f / quad_sum(rows.row_sum[m][i]);
#pragma unroll
    for (int n = 0; n < T::kVectors; ++n) {
        const int column = n * 16 + lane_id() % 4 * 4;
        const float2 bias = __half22float2(*reinterpret_cast<const __half2*>(queries + T::kValueBias + column));
#pragma unroll
        for (int m = 0; m < T::kFragments; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                *reinterpret_cast<__half2*>(shared + T::offset(16 * m + lane_id() / 4 + 8 * i, 0) + column) =
                    __floats2half2_rn(fmaf(rows.attn_out[m][n][2 * i], factor[m][i], bias.x),
                                      fmaf(rows.attn_out[m][n][2 * i + 1], factor[m][i], bias.y));
    }
    __syncwarp();
    __half* attn_out = pass.attn_out(group, head);
#pragma unroll 1
    for (int i = lane_id(); i < T::kWarpRows * T::kVectors; i += kWarp) {
        const int row = i / T::kVectors, vector = i % T::kVectors, index = first + warp_first + row;
        const Half8 loaded = load(shared + T::offset(row, vector));
        if (index < group.size && vector * Half8::kSize < pass.shape.head_dim)
            store(attn_out, group.offset(index) * pass.shape.heads * pass.shape.head_dim + vector * Half8::kSize,
                  loaded);
    }
}

template <typename T, bool kRotates>
__global__ void __launch_bounds__(T::kThreads, T::template blocks<kRotates>()) vision_attention(Pass pass) {
    static_assert(!kRotates || (T::kKeys == TANGO_MAX_ROTATED_WINDOW && T::kRows == T::kKeys && T::kFragments == 1),
                  "a warp rotates its 16 queries and their keys");
    unsigned char* shared = reinterpret_cast<unsigned char*>(shared_memory());
    const SharedAddress base = shared_address(shared);
    const TangoVisionAttentionShape& shape = pass.shape;
    const int row_tiles = ceil_div(pass.largest_group(), T::kRows), parts = ceil_div(shape.heads, pass.heads);
    const int first = blockIdx.x % row_tiles * T::kRows;
    const int first_head = blockIdx.x / row_tiles % parts * pass.heads;
    const int heads = min(pass.heads, shape.heads - first_head);
    const Group group = pass.group(blockIdx.x / row_tiles / parts);
    if (first >= group.size) return;
    clear_padding<T>(pass, heads, shared);

    // Starts the copies of a step: a tile of keys and values of a head, and with the first one its queries.
    const auto copy_step = [&](int step, int head, int key) {
        constexpr int kThreads = T::kThreads, kVectors = T::kVectors, kPitch = T::kPitch;
        const SharedAddress to = base + T::tile(step), queries = base + T::queries(head);
        const int h = first_head + head, d = shape.head_dim;
        if (key == 0) {
            copy_bias(queries + T::kBias, pass.tensors.query_bias, h, d, 0);
            copy_bias(queries + T::kValueBias, pass.tensors.value_bias, h, d, 1);
            if (kRotates) copy_bias(queries + T::kKeyBias, pass.tensors.key_bias, h, d, 2);
            copy_rows<kThreads, kVectors, T::kRows, kPitch, 16>(queries, pass.query(group, h), shape.query_stride, d,
                                                                group, first);
        }
        copy_rows<kThreads, kVectors, T::kKeys, kPitch, 16>(to, pass.key(group, h), shape.key_stride, d, group, key);
        copy_rows<kThreads, kVectors, T::kKeys, kPitch, 16>(to + T::kValues, pass.value(group, h), shape.value_stride,
                                                            d, group, key);
        copy_commit();
    };
    copy_step(0, 0, 0);
    const int warp_first = warp_id() * T::kWarpRows;
    Angles<T> angles;
    if (kRotates) angles.load(pass, group, warp_first);
    RowState<T> rows;
    int head = 0, key = 0;  // of this step
#pragma unroll 1
    for (int step = 0; head < heads; ++step) {
        copy_wait<0>();
        __syncthreads();  // the tile is complete, and no thread reads the one before any more
        const bool is_last = key + T::kKeys >= group.size;
        const int next_head = is_last ? head + 1 : head, next_key = is_last ? 0 : key + T::kKeys;
        if (next_head < heads) copy_step(step + 1, next_head, next_key);
        const int queries = T::queries(head);
        if (kRotates) {
            const int warp_rows = T::offset(warp_first, 0);
            angles.rotate(pass, shared + queries + warp_rows, shared + queries + T::kBias);
            angles.rotate(pass, shared + T::tile(step) + warp_rows, shared + queries + T::kKeyBias);
            __syncthreads();
        }
        if (first + warp_first < group.size) {
            if (!kRotates && key == 0 && pass.tensors.query_bias != nullptr) add_bias<T>(shared + queries, warp_first);
            Scores<T> scores = {};
            compute_qk<T>(scores, base + queries, base + T::tile(step), warp_first);
            if (key + T::kKeys > group.size) mask<T>(scores, key, group.size);
            update_softmax<T>(scores, rows, pass.scale);
            accumulate_pv<T>(rows, scores, base + T::tile(step) + T::kValues);
            if (is_last) {
                write_rows<T>(pass, group, rows, first_head + head, first, warp_first, shared + queries);
                rows = RowState<T>();
            }
        }
        head = next_head, key = next_key;
    }
}

template <typename T>
cudaError_t launch_attention(const VisionPass& pass, cudaStream_t stream) {
    constexpr int kHeadsOfOneTile = 4;
    const int most = pass.largest_group() <= T::kKeys ? kHeadsOfOneTile : 1;
    const int heads = pass.shape.heads < most ? pass.shape.heads : most;
    const int blocks = pass.groups() * ceil_div(pass.shape.heads, heads) * ceil_div(pass.largest_group(), T::kRows);
    const auto enqueue = [&](auto kernel) {
        return launch(kernel, Pass{pass, heads}, blocks, T::kThreads, T::bytes(heads), stream);
    };
    if constexpr (T::kRows == T::kKeys)
        if (pass.tensors.cosines != nullptr) return enqueue(vision_attention<T, true>);
    return enqueue(vision_attention<T, false>);
}

// Large tiles read less shared memory per row. Small tiles waste less where a group has few rows.
template <int kWidth>
cudaError_t launch_attention(const VisionPass& pass, const DeviceProperties& gpu, cudaStream_t stream) {
    using Large = Tile<kWidth, (kWidth > 80) ? 1 : 2>;
    const bool many = pass.largest_group() > Large::kRows && Large::bytes(1) <= gpu.shared_bytes;
    return many ? launch_attention<Large>(pass, stream) : launch_attention<Tile<kWidth, 1>>(pass, stream);
}

cudaError_t launch_attention(const VisionPass& pass, cudaStream_t stream) {
    DeviceProperties gpu;
    const cudaError_t error = query_device(gpu);
    if (error != cudaSuccess) return error;
#ifdef TANGO_SM90A
    constexpr int kLeastRows = 128;  // of a group: fewer would leave warpgroups idle
    if (gpu.major == 9 && pass.largest_group() >= kLeastRows) return vision_attention_sm90(pass, gpu.sms, stream);
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
                                   {"window", shape.window, 0, TANGO_MAX_VISION_WINDOW}}))
        return status;
    const long long width = shape.heads * shape.head_dim, tokens = 1LL * shape.rows * shape.columns;  // at most 2^30
    if (int status = check_ranges({{"frames * rows * columns", shape.frames * tokens, 1, INT_MAX / shape.heads},
                                   {"rows * columns * heads * head_dim", tokens * width, 1, INT_MAX}}))
        return status;
    const long long longest = INT_MAX / tokens;  // a frame's elements are counted in 32 bits
    return check_ranges({{"query_stride", shape.query_stride, width, longest},
                         {"query_stride % 8", shape.query_stride % 8, 0, 0},
                         {"key_stride", shape.key_stride, width, longest},
                         {"key_stride % 8", shape.key_stride % 8, 0, 0},
                         {"value_stride", shape.value_stride, width, longest},
                         {"value_stride % 8", shape.value_stride % 8, 0, 0}});
}

int check_tensors(const TangoVisionAttentionTensors& tensors) {
    const struct {
        const char* name;
        const void* pointer;
        bool may_be_null;
    } all[] = {{"query", tensors.query, false},
               {"key", tensors.key, false},
               {"value", tensors.value, false},
               {"query_bias", tensors.query_bias, true},
               {"key_bias", tensors.key_bias, true},
               {"value_bias", tensors.value_bias, true},
               {"cosines", tensors.cosines, tensors.sines == nullptr},
               {"sines", tensors.sines, tensors.cosines == nullptr},
               {"attn_out", tensors.attn_out, false}};
    for (const auto& tensor : all) {
        if (tensor.pointer == nullptr && tensor.may_be_null) continue;
        if (int status = check_pointer(tensor.name, tensor.pointer, 16)) return status;
    }
    return TANGO_OK;
}

// What a rotation needs: whole vectors in half a head, and all keys in one tile.
int check_rotation(const VisionPass& pass) {
    if (int status = check_ranges({{"head_dim % 16, of heads that are rotated", pass.shape.head_dim % 16, 0, 0}}))
        return status;
    return check_ranges({{"patches of a window with rotation", pass.largest_group(), 1, TANGO_MAX_ROTATED_WINDOW}});
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
    pass.windows_down = ceil_div(shape->rows, pass.window_rows);
    pass.windows_across = ceil_div(shape->columns, pass.window_columns);
    pass.scale = kLog2E / sqrtf(static_cast<float>(shape->head_dim));
    if (int status = tensors->cosines == nullptr ? TANGO_OK : check_rotation(pass)) return status;
    return cuda_status(launch_attention(pass, static_cast<cudaStream_t>(stream)), "vision attention");
}
