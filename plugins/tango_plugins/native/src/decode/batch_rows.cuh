// Matrices that lie by rows, for products of several vectors.
#pragma once

#include "batch_gemv.cuh"

namespace tango {

constexpr int kRowDepth = 8;   // stages that are in flight
constexpr int kWarpTiles = 2;  // that a warp adds up

// The weights of matrices that lie by rows, fp16 or bytes with a scale for each column.
//
// All threads load a stage together: whole rows of the block's tile, of both matrices if there are two, in the order of
// memory. The warps are as many groups as a stage has fragments of rows; those of a group share the tiles. A ring has
// the stages that are in flight, and the one that is multiplied.
template <typename Element>
class BatchRows : public GemvPart {
  public:
    __device__ BatchRows(const GemvPart& part, const Ring& ring, const TangoMatrix& first, const TangoMatrix& second)
        : GemvPart(part), ring_(ring), first_(first), second_(second) {
        seek();
    }

    // Starts the first loads of the block's part.
    __device__ void start() {
#pragma unroll 1
        for (int i = 0; i < depth_; ++i) load();
    }

    // How many rows of the input must be there at first. The rest may be a group of copies that is in flight then.
    __device__ int first_rows() const { return min(depth_ * stage_rows_, rows_); }

    static constexpr bool kIsInteger = sizeof(Element) == 1;
    static constexpr int kDistance = kIsInteger ? 1 : 8;  // of a lane's two columns

    // Finds this thread's first loads.
    __device__ void seek() {
        all_tiles_ = partition_.matrices * tiles();
        const int vectors = all_tiles_ * kTileVectors;
        pitch_ = (vectors | 1) * static_cast<int>(sizeof(uint4));  // odd: eight rows are in all banks
        groups_ = kWarps;
        while (groups_ > 1 && (groups_ * all_tiles_ > kWarps * kWarpTiles || ring_stages() < 4)) groups_ /= 2;
        depth_ = ring_depth(ring_stages() - 1, kRowDepth);
        stage_rows_ = kRows * groups_;
        left_ = is_valid() ? rows_ : 0;
        slot_ = 0;
#pragma unroll
        for (int i = 0; i < kMaxLoads; ++i) {
            const int at = threadIdx.x + i * kThreads, row = at / vectors, vector = at - row * vectors;
            const bool second = vector >= tiles() * kTileVectors;
            const char* const values = static_cast<const char*>((second ? second_ : first_).values);
            from_[i] = values + static_cast<size_t>(row_ + row) * row_bytes() + column_ * sizeof(Element);
            from_[i] += (second ? vector - tiles() * kTileVectors : vector) * sizeof(uint4);
            load_row_[i] = row < stage_rows_ ? row : partition_.rows;  // nothing to load
            to_[i] = row * pitch_ + vector * static_cast<int>(sizeof(uint4));
        }
    }

    // Adds the block's rows, and stores the sums in the place of the ring.
    __device__ void accumulate(const Fragment* input) {
        const int sets = kWarps / groups_, group = warp_id() / sets, set = warp_id() % sets;
        float sum[kWarpTiles][4] = {};
        int slot = 0;
#pragma unroll 1
        for (int row = group * kRows; row - group * kRows < rows_; row += stage_rows_) {
            wait_for_oldest<kRowDepth>(depth_);
            sync_threads();
            load();  // to where all warps have read the stage before
            char* const weights = ring() + slot + group * kRows * pitch_;
            slot = next(slot);
            if (row >= rows_) continue;
            Fragment rows[kFragments];
#pragma unroll
            for (int i = 0; i < kFragments; ++i) rows[i] = input[(row / kFragmentRows + i) * kWarp + lane_id()];
#pragma unroll
            for (int i = 0; i < kWarpTiles; ++i)
                if (set + i * sets < all_tiles_) multiply(sum[i], weights, set + i * sets, rows);
        }
        copy_wait<0>();
        sync_threads();
#pragma unroll
        for (int i = 0; i < kWarpTiles; ++i)
            if (set + i * sets < all_tiles_)
                sums(group, set + i * sets)[lane_id()] = make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
        sync_threads();
    }

    // The lane's results of a tile, of the first matrix or the second: two columns of two sequences.
    __device__ float4 total(int matrix, int tile) const {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int group = 0; group < groups_; ++group) sum = sum + sums(group, matrix * tiles() + tile)[lane_id()];
        float2 scale = make_float2(1.0f, 1.0f);
        if constexpr (kIsInteger) {
            const float* const scales = static_cast<const float*>((matrix == 0 ? first_ : second_).scales);
            scale = *reinterpret_cast<const float2*>(scales + column_ + tile * kTileColumns + lane_column());
        }
        return make_float4(sum.x * scale.x, sum.y * scale.x, sum.z * scale.y, sum.w * scale.y);
    }

    // The first of the lane's two columns of a tile.
    __device__ static int lane_column() { return lane_id() / 4 * (kIsInteger ? 2 : 1); }

  private:
    static constexpr int kRows = kIsInteger ? 32 : 16;  // of a group
    static constexpr int kFragments = kRows / kFragmentRows;
    static constexpr int kTileVectors = kTileColumns * sizeof(Element) / sizeof(uint4);      // of a row of a tile
    static constexpr int kMaxLoads = kWarps * kWarpTiles * kRows * kTileVectors / kThreads;  // of a thread and stage

    __device__ char* ring() const { return reinterpret_cast<char*>(ring_.memory); }
    __device__ int row_bytes() const { return partition_.columns * static_cast<int>(sizeof(Element)); }
    __device__ int stage_bytes() const { return kRows * groups_ * pitch_; }
    __device__ int ring_stages() const { return ring_.bytes / stage_bytes(); }
    __device__ int next(int slot) const { return slot < depth_ * stage_bytes() ? slot + stage_bytes() : 0; }

    // Starts the loads of the next stage, if there is one.
    __device__ void load() {
        if (left_ > 0) {
            const SharedAddress to = shared_address(ring() + slot_);
#pragma unroll
            for (int i = 0; i < kMaxLoads; ++i) {
                if (load_row_[i] < left_) copy_async(to + to_[i], from_[i]);
                from_[i] += static_cast<ptrdiff_t>(stage_rows_) * row_bytes();
            }
            left_ -= stage_rows_;
            slot_ = next(slot_);
        }
        copy_commit();
    }

    // Adds a tile of the rows of a group.
    __device__ void multiply(float (&sum)[4], char* weights, int tile, const Fragment (&rows)[kFragments]) const {
        const int lane = lane_id();
        const int row = kIsInteger ? lane : lane / 16 * 8 + lane % 8;
        const int vector = tile * kTileVectors + (kIsInteger ? 0 : lane / 8 % 2);
        uint32_t words[4];
        load_transposed(words, shared_address(weights + row * pitch_ + vector * static_cast<int>(sizeof(uint4))));
        if constexpr (kIsInteger) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t first = words[2 * i], second = words[2 * i + 1];
                multiply_add(sum,
                             {unpack_signed<0, 2>(first), unpack_signed<1, 3>(first), unpack_signed<0, 2>(second),
                              unpack_signed<1, 3>(second)},
                             rows[i]);
            }
        } else {
            multiply_add(sum, words, rows[0]);
        }
    }

    // sum[16, 8] += weights[16, 16] input[16, 8].
    __device__ static void multiply_add(float (&sum)[4], const uint32_t (&weights)[4], const Fragment& input) {
        float low[4] = {};
        mma(sum, weights, {input.x, input.y});
        mma(low, weights, {input.z, input.w});
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += low[i] / kLowScale;
    }

    // The sums of a group's tile, one float4 for each lane.
    __device__ float4* sums(int group, int tile) const {
        return reinterpret_cast<float4*>(ring_.memory) + (group * all_tiles_ + tile) * kWarp;
    }

    Ring ring_;
    const TangoMatrix &first_, &second_;
    int all_tiles_;                            // of both matrices
    int pitch_;                                // bytes of a row in the ring
    int groups_, stage_rows_;                  // of a stage
    int depth_;                                // stages in flight
    int left_, slot_;                          // rows to be loaded, and where the next stage goes
    const char* from_[kMaxLoads];              // what the thread loads of it
    int load_row_[kMaxLoads], to_[kMaxLoads];  // their rows in a stage, and places in a slot
};

}  // namespace tango
