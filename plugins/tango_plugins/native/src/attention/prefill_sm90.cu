// Attention of a prefill by Hopper's warpgroup instructions. They exist on sm_90a only, so this file is compiled for
// nothing else.
//
// As prefill.cu, which launches it after append_kv(), with one block per SM that goes from one tile of query rows to
// the next. One of its warpgroups copies queries, keys and values ahead, each tile of keys and of values to a slot of a
// ring. The others have 64 query rows each. A warpgroup has the products of the next keys and of the last values
// computed together, and then its softmax, while the tensor cores work for the other warpgroups.
//
// The queries come from where the output goes to: each block reads its own rows before it writes them.
#include "attention/flash_sm90.cuh"
#include "attention/pass.cuh"

namespace tango {
namespace {

// What a block works on.
template <int kHeadDim, int kQueryWarpgroups, int kKeysOfTile>
struct Tile {
    static constexpr int kWidth = kHeadDim, kConsumers = kQueryWarpgroups;
    static constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
    static constexpr int kRows = 64 * kConsumers, kKeys = kKeysOfTile;
    static constexpr int kVectors = kWidth / Half8::kSize;
    // Odd multiples of 16 bytes, so that neighboring vectors of a row are in different banks.
    static constexpr int kQueryPitch = kRows * 16 + 16, kPitch = kKeys * 16 + 16;
    static constexpr int kQueryBytes = kVectors * kQueryPitch, kSlotBytes = kVectors * kPitch;
    static constexpr int kQueryBuffers = 2, kBuffersBytes = kQueryBuffers * (kQueryBytes + kBarrierBytes);
    static constexpr int kSlots = (kHopperSharedBytes - kBuffersBytes) / (kSlotBytes + kBarrierBytes);
    static constexpr int kBytes = kBuffersBytes + kSlots * (kSlotBytes + kBarrierBytes);
    // Of a thread: the SM has 64 Ki of them.
    static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
    static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
};

template <typename T>
using QueryRing = Ring<T::kQueryBuffers, T::kQueryBytes>;
template <typename T>
using KeyValueRing = Ring<T::kSlots, T::kSlotBytes>;

template <typename T>
__host__ __device__ int tiles_of_head(const Pass& pass) {
    return ceil_div(pass.shape.tokens * pass.group_size(), T::kRows);
}

// The tiles of query rows of a block, one after the other. Those with the most keys come first. The blocks take turns
// in one order and then in the reverse one, so that all have about as many keys.
template <typename T>
class Works {
  public:
    __device__ Works(const Pass& pass)
        : pass_(pass), tiles_(tiles_of_head<T>(pass)), first_position_(pass.first_position()) {}

    // Goes to the next one, if there is one.
    __device__ bool next() {
        const int place = round_ % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
        const int index = round_++ * gridDim.x + place;
        if (index >= tiles_ * pass_.shape.kv_heads) return false;
        head_ = index % pass_.shape.kv_heads;
        first_row_ = (tiles_ - 1 - index / pass_.shape.kv_heads) * T::kRows;
        keys_ = last_position(first_row_ + T::kRows - 1) + 1;
        return true;
    }

    __device__ int head() const { return head_; }            // of keys and values
    __device__ int first_row() const { return first_row_; }  // of the tile
    __device__ int keys() const { return keys_; }            // that its last row attends to

    // The last position that a row attends to.
    __device__ int last_position(int row) const {
        return first_position_ + min(row / pass_.group_size(), pass_.shape.tokens - 1);
    }

    // Where a row's query is, and its output will be.
    __device__ __half* row(int row) const {
        const int group_size = pass_.group_size();
        const size_t at =
            static_cast<size_t>(row / group_size) * pass_.shape.heads + head_ * group_size + row % group_size;
        return static_cast<__half*>(pass_.tensors.attn_out) + at * T::kWidth;
    }

    __device__ int rows() const { return pass_.shape.tokens * pass_.group_size(); }

  private:
    const Pass& pass_;
    const int tiles_, first_position_;  // tiles of a head
    int round_ = 0, head_, first_row_, keys_;
};

// The warpgroup that copies. A thread has one vector of every kRowsPerPass-th row.
template <typename T>
class Producer {
  public:
    __device__ Producer(const Pass& pass)
        : pass_(pass), row_(threadIdx.x / T::kVectors), vector_(threadIdx.x % T::kVectors) {}

    __device__ void run(QueryRing<T> queries, KeyValueRing<T> ring) {
        for (Works<T> works(pass_); works.next();) {
            queries.wait_emptied();
            copy_queries(works, queries.buffer());
            copies_.finish(queries.filled());
            queries.advance();
            const size_t at = static_cast<size_t>(works.head()) * pass_.shape.capacity * T::kWidth;
            for (int first = 0; first < works.keys(); first += T::kKeys) {
                copy_tile(ring, static_cast<const __half*>(pass_.tensors.keys) + at, first, works.keys());
                copy_tile(ring, static_cast<const __half*>(pass_.tensors.values) + at, first, works.keys());
            }
        }
        copies_.drain();
    }

  private:
    static constexpr int kRowsPerPass = kGroupThreads / T::kVectors;
    static_assert(T::kRows % kRowsPerPass == 0 && T::kKeys % kRowsPerPass == 0, "all threads have as many rows");

    // Rows past the last one repeat it.
    __device__ void copy_queries(const Works<T>& works, SharedAddress to) const {
        to += vector_ * T::kQueryPitch;
#pragma unroll 1
        for (int row = row_; row < T::kRows; row += kRowsPerPass) {
            const __half* from = works.row(min(works.first_row() + row, works.rows() - 1));
            copy_async_cached(to + row * 16, from + vector_ * Half8::kSize);
        }
    }

    // Keys past the last one of the tile of queries repeat it: memory after the last token may be NaN.
    __device__ void copy_tile(KeyValueRing<T>& ring, const __half* from, int first, int keys) {
        ring.wait_emptied();
        const SharedAddress to = ring.buffer() + vector_ * T::kPitch + row_ * 16;
        from += vector_ * Half8::kSize;
        if (first + T::kKeys <= keys) {
            from += static_cast<size_t>(first + row_) * T::kWidth;
#pragma unroll
            for (int r = 0; r < T::kKeys; r += kRowsPerPass) copy_async_cached(to + r * 16, from + r * T::kWidth);
        } else {
#pragma unroll 1
            for (int r = 0; r < T::kKeys; r += kRowsPerPass)
                copy_async_cached(to + r * 16, from + static_cast<size_t>(min(first + r + row_, keys - 1)) * T::kWidth);
        }
        copies_.finish(ring.filled());
        ring.advance();
    }

    const Pass& pass_;
    const int row_, vector_;
    Copies copies_;
};

// Two warpgroups take turns to start their products. Otherwise both would multiply at the same time, and then both
// would compute their softmax, without work for the tensor cores. Three always leave them some.
template <typename T>
class Turns {
  public:
    __device__ Turns(int group) : group_(group) {
        if (group_ == T::kConsumers - 1) pass_on();
    }

    __device__ void wait() const {
        if (T::kConsumers == 2) named_barrier_sync<2 * kGroupThreads>(1 + group_);
    }

    __device__ void pass_on() const {
        if (T::kConsumers == 2) named_barrier_arrive<2 * kGroupThreads>(2 - group_);
    }

    // Every warpgroup has had as many turns. The first one waits for what the last one has passed on.
    __device__ void end() const {
        if (group_ == 0) wait();
    }

  private:
    const int group_;
};

// A warpgroup with 64 query rows.
template <typename T>
class Consumer : Products<T, T::kWidth / 2> {
  public:
    __device__ Consumer(const Pass& pass, int group)
        : Operands(group * 64 + warp_id() % kGroupWarps * 16), pass_(pass), turns_(group) {}

    __device__ void run(QueryRing<T> queries, KeyValueRing<T> ring) {
        for (Works<T> works(pass_); works.next();) {
            queries.wait_filled();
            load_queries(queries.buffer());
            attend(works, ring);
            write(works, queries.buffer());
            arrive_warp(queries.emptied());
            queries.advance();
        }
        turns_.end();
    }

  private:
    using Operands = Products<T, T::kWidth / 2>;
    using Operands::attn_out_, Operands::first_row_, Operands::load_queries, Operands::multiply_keys,
        Operands::multiply_values, Operands::scores_, Operands::wait_products, Operands::warp_rows, Operands::weights_;

    // The ring is at the first keys, and ends after the last values.
    __device__ void attend(const Works<T>& works, KeyValueRing<T>& ring) {
        const int row = works.first_row() + first_row_, unmasked = works.last_position(row) + 1;
        const int last[] = {works.last_position(row + lane_id() / 4), works.last_position(row + lane_id() / 4 + 8)};
        reset();
        ring.wait_filled();
        begin_products();
        multiply_keys(ring.buffer());
        finish_products();
        arrive_warp(ring.emptied());
        ring.advance();
#pragma unroll 1
        for (int first = 0;; first += T::kKeys) {
            if (first + T::kKeys > unmasked) mask(first, last);
            if (first == 0) raise_maxima();
            if (!compute_weights()) {  // relative to raised maxima they are at most 1
                raise_maxima();
                compute_weights();
            }
            add_sums();
            if (first + T::kKeys >= works.keys()) break;
            const KeyValueRing<T> values = ring;
            ring.advance();
            ring.wait_filled();
            begin_products();
            multiply_keys(ring.buffer());
            multiply_values(values.buffer());  // they were filled before the keys
            finish_products();
            arrive_warp(values.emptied());
            arrive_warp(ring.emptied());
            ring.advance();
        }
        ring.wait_filled();
        begin_products();
        multiply_values(ring.buffer());
        finish_products();
        arrive_warp(ring.emptied());
        ring.advance();
    }

    __device__ void reset() {
        row_max_[0] = row_max_[1] = -INFINITY;
        row_sum_[0] = row_sum_[1] = 0.0f;
#pragma unroll
        for (float& sum : attn_out_) sum = 0.0f;
    }

    __device__ void begin_products() {
        turns_.wait();
        wgmma_begin();
    }

    __device__ void finish_products() {
        wgmma_commit();
        turns_.pass_on();
        wait_products();
    }

    // Masks the keys after each row's last position; `first` is the tile's first one.
    __device__ void mask(int first, const int (&last)[2]) {
        const int column = first + lane_id() % 4 * 2;
#pragma unroll
        for (int i = 0; i < T::kKeys / 2; ++i)
            if (column + i / 4 * 8 + i % 2 > last[i / 2 % 2]) scores_[i] = -INFINITY;
    }

    // Turns scores into weights relative to the row maxima so far, and says whether no weight of the warp is above 2^8.
    // Up to there weights are as exact as below 1. So few tiles raise a maximum, and the others need not find theirs
    // before their exponentials can start.
    __device__ bool compute_weights() {
        __half2 largest[4];
#pragma unroll
        for (int i = 0; i < T::kKeys / 4; ++i) {
            const float a = exp2_fast(scores_[2 * i] - row_max_[i % 2]);
            const float b = exp2_fast(scores_[2 * i + 1] - row_max_[i % 2]);
            const __half2 pair = __floats2half2_rn(a, b);
            sums_[i % 4] = i < 4 ? a + b : sums_[i % 4] + (a + b);
            weights_[i / 4][i % 4] = reinterpret_cast<const uint32_t&>(pair);
            largest[i % 4] = i < 4 ? pair : __hmax2(largest[i % 4], pair);
        }
        const float2 all = __half22float2(__hmax2(__hmax2(largest[0], largest[1]), __hmax2(largest[2], largest[3])));
        return !__any_sync(kAllLanes, fmaxf(all.x, all.y) > 256.0f);
    }

    // Adds the weights to the sums of their rows.
    __device__ void add_sums() {
#pragma unroll
        for (int i = 0; i < 2; ++i) row_sum_[i] += sums_[i] + sums_[i + 2];
    }

    // Takes the scores into the row maxima, and rescales sums and output to them.
    __device__ void raise_maxima() {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float row_max = row_max_[i];
#pragma unroll
            for (int n = 0; n < T::kKeys / 8; ++n)
                row_max = fmaxf(row_max, fmaxf(scores_[4 * n + 2 * i], scores_[4 * n + 2 * i + 1]));
            row_max = quad_max(row_max);
            const float rescale = exp2_fast(row_max_[i] - row_max);
            row_max_[i] = row_max;
            row_sum_[i] *= rescale;
#pragma unroll
            for (int n = 0; n < T::kVectors; ++n) {
                attn_out_[4 * n + 2 * i] *= rescale;
                attn_out_[4 * n + 2 * i + 1] *= rescale;
            }
        }
    }

    // Writes a warp's 16 rows, by way of where its queries were.
    __device__ void write(const Works<T>& works, SharedAddress queries) const {
        const SharedAddress rows = warp_rows(queries);
        const float factor[] = {1.0f / quad_sum(row_sum_[0]), 1.0f / quad_sum(row_sum_[1])};
#pragma unroll
        for (int n = 0; n < T::kVectors; ++n) {
            uint32_t packed[2];
#pragma unroll
            for (int i = 0; i < 2; ++i)
                packed[i] = pack(attn_out_[4 * n + 2 * i] * factor[i], attn_out_[4 * n + 2 * i + 1] * factor[i]);
            store_matrices(packed, rows + n * T::kQueryPitch + lane_id() % 16 * 16);
        }
        __syncwarp();
        const int vector = lane_id() % T::kVectors;
#pragma unroll
        for (int row = lane_id() / T::kVectors; row < 16; row += kWarp / T::kVectors) {
            const int index = works.first_row() + first_row_ + row;
            if (index < works.rows())
                store(works.row(index) + vector * Half8::kSize,
                      load(shared_pointer(rows + vector * T::kQueryPitch + row * 16)));
        }
    }

    const Pass& pass_;
    const Turns<T> turns_;
    float row_max_[2], row_sum_[2];
    float sums_[4];  // of the tile's weights: two of each row
};

template <typename T>
__global__ void __launch_bounds__(T::kThreads, 1) prefill_attention_sm90(const __grid_constant__ Pass pass) {
    const SharedAddress base = shared_address(shared_memory());
    const SharedAddress slots = base + T::kQueryBuffers * T::kQueryBytes;
    const SharedAddress barriers = slots + T::kSlots * T::kSlotBytes;
    QueryRing<T> queries(base, barriers);
    KeyValueRing<T> ring(slots, barriers + T::kQueryBuffers * kBarrierBytes);
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
        Consumer<T>(pass, group - 1).run(queries, ring);
    }
}

template <typename T>
cudaError_t launch_sm90(const Pass& pass, int sms, cudaStream_t stream) {
    const int tiles = tiles_of_head<T>(pass) * pass.shape.kv_heads;
    return launch(prefill_attention_sm90<T>, pass, tiles < sms ? tiles : sms, T::kThreads, T::kBytes, stream);
}

}  // namespace

cudaError_t prefill_attention_sm90(const Pass& pass, int sms, cudaStream_t stream) {
    using Large = Tile<64, 3, 96>;  // no registers are left for it at twice the head_dim
    if (pass.shape.head_dim == 128) return launch_sm90<Tile<128, 2, 128>>(pass, sms, stream);
    if (tiles_of_head<Large>(pass) * pass.shape.kv_heads >= 2 * sms) return launch_sm90<Large>(pass, sms, stream);
    return launch_sm90<Tile<64, 2, 128>>(pass, sms, stream);  // where the longest tile would take most of the time
}

}  // namespace tango
