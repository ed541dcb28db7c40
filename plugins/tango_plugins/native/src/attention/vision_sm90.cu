// Attention of a vision tower by Hopper's warpgroup instructions. They exist on sm_90a only, so this file is compiled
// for nothing else.
//
// As vision.cu, with one block per SM that goes from one tile of queries to the next. One of its warpgroups copies
// queries, keys and values ahead, each tile of keys and of values to a slot of a ring. The others have 64 query rows
// each. A warpgroup has the products of the next keys and of the last values computed together, and then its softmax,
// while the tensor cores work for the other warpgroups.
#include "attention/flash_sm90.cuh"
#include "attention/vision.cuh"

namespace tango {
namespace {

// What a block works on: the padded head_dim of queries and keys, which is a multiple of 16, and that of the values. A
// column of ones follows the values: its product with the weights is their sum.
template <int kWidthOfKeys, int kWidthOfValues, int kQueryWarpgroups, int kKeysOfTile>
struct Tile {
    static constexpr int kWidth = kWidthOfKeys, kConsumers = kQueryWarpgroups;
    static constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
    static constexpr int kRows = 64 * kConsumers, kKeys = kKeysOfTile;
    // Vectors of eight dimensions: of queries and keys, of values, and of values with the ones.
    static constexpr int kVectors = kWidth / 8, kValueVectors = kWidthOfValues / 8, kSums = kValueVectors;
    // Odd multiples of 16 bytes, so that neighboring vectors of a row are in different banks.
    static constexpr int kQueryPitch = kRows * 16 + 16, kPitch = kKeys * 16 + 16;
    // After the queries come the biases of queries and values, and what the rows are.
    static constexpr int kBias = kVectors * kQueryPitch, kValueBias = kBias + kVectors * 16;
    static constexpr int kWork = kValueBias + kVectors * 16, kQueryBytes = kWork + 32;
    static constexpr int kSlotBytes = (kVectors > kSums ? kVectors : kSums + 1) * kPitch;
    static constexpr int kQueryBuffers = 2;
    static constexpr int kRingBytes = kHopperSharedBytes - kQueryBuffers * (kQueryBytes + kBarrierBytes);
    static constexpr int kSlots = kRingBytes / (kSlotBytes + kBarrierBytes) / 2 * 2;  // for keys and values in turns
    static constexpr int kBytes = kQueryBuffers * (kQueryBytes + kBarrierBytes) + kSlots * (kSlotBytes + kBarrierBytes);
    // Of a thread: the SM has 64 Ki of them.
    static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
    static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
};

template <typename T>
using QueryRing = Ring<T::kQueryBuffers, T::kQueryBytes>;
template <typename T>
using KeyValueRing = Ring<T::kSlots, T::kSlotBytes>;

// One head of a group, and the first of its query rows that a block handles. The producer finds it, and passes it on
// with the queries; a group of size 0 is the end.
struct Work {
    Group group;
    int head, first;
};
static_assert(sizeof(Work) <= 32, "Tile has 32 bytes for it");

// The warpgroup that copies.
template <typename T>
class Producer {
  public:
    __device__ Producer(const VisionPass& pass) : pass_(pass) {}

    __device__ void run(QueryRing<T> queries, KeyValueRing<T> ring) {
        const int tiles = ceil_div(pass_.largest_group(), T::kRows), heads = pass_.shape.heads;
        for (int index = blockIdx.x; index < pass_.groups() * heads * tiles; index += gridDim.x) {
            const Work work = {pass_.group(index / tiles / heads), index / tiles % heads, index % tiles * T::kRows};
            if (work.first >= work.group.size) continue;  // a group that is cut off has fewer tiles
            queries.wait_emptied();
            const __half *query = pass_.query(work.group, work.head), *key = pass_.key(work.group, work.head);
            const __half* value = pass_.value(work.group, work.head);
            const TangoVisionAttentionTensors& tensors = pass_.tensors;
            copy_bias(queries.buffer() + T::kBias, tensors.query_bias, work.head, pass_.shape.head_dim, 0);
            copy_bias(queries.buffer() + T::kValueBias, tensors.value_bias, work.head, pass_.shape.head_dim, 1);
            copy_rows<kGroupThreads, T::kValueVectors, T::kRows, 16, T::kQueryPitch>(
                queries.buffer(), query, pass_.shape.query_stride, pass_.shape.head_dim, work.group, work.first);
            pass_on(queries, work);
            for (int first = 0; first < work.group.size; first += T::kKeys) {
                copy_tile(ring, key, pass_.shape.key_stride, work.group, first);
                copy_tile(ring, value, pass_.shape.value_stride, work.group, first);
            }
        }
        queries.wait_emptied();
        pass_on(queries, Work{});
        copies_.drain();
    }

  private:
    __device__ void pass_on(QueryRing<T>& queries, const Work& work) {
        if (threadIdx.x == 0) *static_cast<Work*>(shared_pointer(queries.buffer() + T::kWork)) = work;
        copies_.finish(queries.filled());
        queries.advance();
    }

    __device__ void copy_tile(KeyValueRing<T>& ring, const __half* from, int stride, const Group& group, int first) {
        ring.wait_emptied();
        copy_rows<kGroupThreads, T::kValueVectors, T::kKeys, 16, T::kPitch>(ring.buffer(), from, stride,
                                                                            pass_.shape.head_dim, group, first);
        copies_.finish(ring.filled());
        ring.advance();
    }

    const VisionPass& pass_;
    Copies copies_;
};

// A warpgroup with 64 query rows.
template <typename T>
class Consumer : Products<T, 4 * (T::kSums + 1)> {
  public:
    __device__ Consumer(const VisionPass& pass)
        : Operands((static_cast<int>(threadIdx.x) - kGroupThreads) / kWarp * 16), pass_(pass) {}

    __device__ void run(QueryRing<T> queries, KeyValueRing<T> ring) {
        while (true) {
            queries.wait_filled();
            const Work& work = *static_cast<const Work*>(shared_pointer(queries.buffer() + T::kWork));
            if (work.group.size == 0) break;
            load_queries(queries.buffer());
            add_bias(queries.buffer());
            attend(work.group.size, ring);
            write(work, queries.buffer());
            arrive_warp(queries.emptied());
            queries.advance();
        }
    }

  private:
    using Operands = Products<T, 4 * (T::kSums + 1)>;
    using Operands::attn_out_, Operands::first_row_, Operands::load_queries, Operands::multiply_keys,
        Operands::multiply_values, Operands::queries_, Operands::scores_, Operands::wait_products, Operands::warp_rows,
        Operands::weights_;

    __device__ void add_bias(SharedAddress queries) {
        if (pass_.tensors.query_bias == nullptr) return;
#pragma unroll
        for (int k = 0; k < Operands::kWidthSteps; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const SharedAddress bias = queries + T::kBias + (2 * k + i / 2) * 16 + lane_id() % 4 * 4;
                __half2& pair = reinterpret_cast<__half2&>(queries_[k][i]);
                pair = __hadd2(pair, *static_cast<const __half2*>(shared_pointer(bias)));
            }
    }

    // The ring is at the first keys, and ends after the last values.
    __device__ void attend(int size, KeyValueRing<T>& ring) {
        row_max_[0] = row_max_[1] = -INFINITY;
#pragma unroll
        for (float& sum : attn_out_) sum = 0.0f;
        ring.wait_filled();
        wgmma_begin();
        multiply_keys(ring.buffer());
        finish_products();
        arrive_warp(ring.emptied());
        ring.advance();
#pragma unroll 1
        for (int first = 0;; first += T::kKeys) {
            if (first + T::kKeys > size) mask(first, size);
            if (first == 0) raise_maxima();
            if (!compute_weights()) {  // relative to raised maxima they are at most 1
                raise_maxima();
                compute_weights();
            }
            if (first + T::kKeys >= size) break;
            const KeyValueRing<T> values = ring;
            ring.advance();
            ring.wait_filled();
            wgmma_begin();
            multiply_keys(ring.buffer());
            multiply_values(values.buffer());  // they were filled before the keys
            finish_products();
            arrive_warp(values.emptied());
            arrive_warp(ring.emptied());
            ring.advance();
        }
        ring.wait_filled();
        wgmma_begin();
        multiply_values(ring.buffer());
        finish_products();
        arrive_warp(ring.emptied());
        ring.advance();
    }

    __device__ void finish_products() {
        wgmma_commit();
        wait_products();
    }

    // Masks the keys past the last one; `first` is that of the tile.
    __device__ void mask(int first, int size) {
        const int column = first + lane_id() % 4 * 2;
#pragma unroll
        for (int i = 0; i < T::kKeys / 2; ++i)
            if (column + i / 4 * 8 + i % 2 >= size) scores_[i] = -INFINITY;
    }

    // Turns scores into weights relative to the row maxima so far, and says whether no weight of the warp is above 2^8.
    // Up to there weights are as exact as below 1. So few tiles raise a maximum, and the others need not find theirs
    // before their exponentials can start.
    __device__ bool compute_weights() {
        const float shift[] = {row_max_[0] * pass_.scale, row_max_[1] * pass_.scale};
        __half2 largest[4];
#pragma unroll
        for (int i = 0; i < T::kKeys / 4; ++i) {
            const __half2 pair = __floats2half2_rn(exp2_fast(fmaf(scores_[2 * i], pass_.scale, -shift[i % 2])),
                                                   exp2_fast(fmaf(scores_[2 * i + 1], pass_.scale, -shift[i % 2])));
            weights_[i / 4][i % 4] = reinterpret_cast<const uint32_t&>(pair);
            largest[i % 4] = i < 4 ? pair : __hmax2(largest[i % 4], pair);
        }
        const float2 all = __half22float2(__hmax2(__hmax2(largest[0], largest[1]), __hmax2(largest[2], largest[3])));
        return !__any_sync(kAllLanes, fmaxf(all.x, all.y) > 256.0f);
    }

    // Takes the scores into the row maxima, and rescales the output to them.
    __device__ void raise_maxima() {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float row_max = row_max_[i];
#pragma unroll
            for (int n = 0; n < T::kKeys / 8; ++n)
                row_max = fmaxf(row_max, fmaxf(scores_[4 * n + 2 * i], scores_[4 * n + 2 * i + 1]));
            row_max = quad_max(row_max);
            const float rescale = exp2_fast((row_max_[i] - row_max) * pass_.scale);
            row_max_[i] = row_max;
#pragma unroll
            for (int n = 0; n <= T::kSums; ++n) {
                attn_out_[4 * n + 2 * i] *= rescale;
                attn_out_[4 * n + 2 * i + 1] *= rescale;
            }
        }
    }

    // Writes a warp's 16 rows, by way of where its queries were.
    __device__ void write(const Work& work, SharedAddress queries) const {
        const SharedAddress rows = warp_rows(queries);
        const float factor[] = {1.0f / attn_out_[4 * T::kSums], 1.0f / attn_out_[4 * T::kSums + 2]};
        const SharedAddress value_bias = queries + T::kValueBias + lane_id() % 4 * 4;
        float2 bias[T::kValueVectors];
#pragma unroll
        for (int n = 0; n < T::kValueVectors; ++n)
            bias[n] = __half22float2(*static_cast<const __half2*>(shared_pointer(value_bias + n * 16)));
#pragma unroll
        for (int n = 0; n < T::kValueVectors; ++n) {
            uint32_t packed[2];
#pragma unroll
            for (int i = 0; i < 2; ++i)
                packed[i] = pack(fmaf(attn_out_[4 * n + 2 * i], factor[i], bias[n].x),
                                 fmaf(attn_out_[4 * n + 2 * i + 1], factor[i], bias[n].y));
            store_matrices(packed, rows + n * T::kQueryPitch + lane_id() % 16 * 16);
        }
        __syncwarp();
        constexpr int kSteps = ceil_div(16 * T::kValueVectors, kWarp);
        Half8 vectors[kSteps];
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            const int at = i * kWarp + lane_id(), row = at / T::kValueVectors, vector = at % T::kValueVectors;
            vectors[i] = load(shared_pointer(rows + vector * T::kQueryPitch + row * 16));
        }
        __half* attn_out = pass_.attn_out(work.group, work.head);
        const int stride = pass_.shape.heads * pass_.shape.head_dim;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            const int at = i * kWarp + lane_id(), row = at / T::kValueVectors, vector = at % T::kValueVectors;
            const int index = work.first + first_row_ + row;
            if (row < 16 && index < work.group.size && vector * Half8::kSize < pass_.shape.head_dim)
                store(attn_out, work.group.offset(index) * stride + vector * Half8::kSize, vectors[i]);
        }
    }

    const VisionPass& pass_;
    float row_max_[2];
};

// Sets what no copy writes: zeros where head_dim or the bias is missing, and ones after the values.
template <typename T>
__device__ void fill_shared(int head_dim) {
    constexpr unsigned kOnes = 0x3c003c00;  // two fp16
    const SharedAddress base = shared_address(shared_memory()), ring = base + T::kQueryBuffers * T::kQueryBytes;
    const uint4 zeros = make_uint4(0, 0, 0, 0), ones = make_uint4(kOnes, kOnes, kOnes, kOnes);
    const int vectors = head_dim / Half8::kSize;
    for (int buffer = 0; buffer < T::kQueryBuffers; ++buffer)
        for (int i = vectors * T::kQueryPitch / 16 + threadIdx.x; i < T::kQueryBytes / 16; i += T::kThreads)
            static_cast<uint4*>(shared_pointer(base + buffer * T::kQueryBytes))[i] = zeros;
    for (int slot = 0; slot < T::kSlots; ++slot)
        for (int i = vectors * T::kPitch / 16 + threadIdx.x; i < T::kSlotBytes / 16; i += T::kThreads)
            static_cast<uint4*>(shared_pointer(ring + slot * T::kSlotBytes))[i] =
                slot % 2 && i >= T::kSums * T::kPitch / 16 ? ones : zeros;
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads, 1) vision_attention_sm90(const __grid_constant__ VisionPass pass) {
    const SharedAddress base = shared_address(shared_memory());
    const SharedAddress barriers = base + T::kQueryBuffers * T::kQueryBytes + T::kSlots * T::kSlotBytes;
    QueryRing<T> queries(base, barriers);
    KeyValueRing<T> ring(base + T::kQueryBuffers * T::kQueryBytes, barriers + T::kQueryBuffers * kBarrierBytes);
    fill_shared<T>(pass.shape.head_dim);
    wgmma_publish();
    if (threadIdx.x == 0) {
        queries.init(T::kConsumers);
        ring.init(T::kConsumers);
        mbarrier_publish();
    }
    __syncthreads();
    const int group = __shfl_sync(kAllLanes, threadIdx.x / kGroupThreads, 0);  // so that the compiler knows: uniform
    if (group == 0) {
        keep_registers<T::kProducerRegisters>();
        Producer<T>(pass).run(queries, ring);
    } else {
        take_registers<T::kConsumerRegisters>();
        Consumer<T>(pass).run(queries, ring);
    }
}

template <typename T>
cudaError_t launch_sm90(const VisionPass& pass, int sms, cudaStream_t stream) {
    const int tiles = pass.groups() * pass.shape.heads * ceil_div(pass.largest_group(), T::kRows);
    return launch(vision_attention_sm90<T>, pass, tiles < sms ? tiles : sms, T::kThreads, T::kBytes, stream);
}

}  // namespace

cudaError_t vision_attention_sm90(const VisionPass& pass, int sms, cudaStream_t stream) {
    const int head_dim = pass.shape.head_dim;
    if (head_dim <= 64) return launch_sm90<Tile<64, 64, 3, 96>>(pass, sms, stream);
    if (head_dim <= 72) return launch_sm90<Tile<80, 72, 3, 96>>(pass, sms, stream);
    if (head_dim <= 80) return launch_sm90<Tile<80, 80, 3, 80>>(pass, sms, stream);
    return launch_sm90<Tile<128, 128, 2, 128>>(pass, sms, stream);
}

}  // namespace tango
