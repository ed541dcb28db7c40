// Matrices that lie by rows, for products of several vectors.
#pragma once

#include "batch_gemv.cuh"

namespace tango {

constexpr int kRowStages = 4, kMaxRowStages = 8;  // of a block's ring: all but one are in flight
constexpr int kWarpTiles = 6;                     // that a warp adds up
constexpr int kMaxGroups = 8;

// The weights of matrices that lie by rows, fp16 or bytes with a scale for each column.
//
// All threads load a stage together: whole rows of the block's tile, of both matrices if there are two, in the order of
// memory. The warps are as many groups as a stage has fragments of rows; those of a group share the tiles.
template <typename Element>
class BatchRows : public BatchPart {
  public:
    __device__ BatchRows(const BatchPart& part, const Ring& ring, const TangoMatrix& first, const TangoMatrix& second)
        : BatchPart(part),
          lane_(opaque(lane_id())),
          warp_(opaque(warp_id())),
          ring_(reinterpret_cast<char*>(ring.memory)),
          ring_bytes_(ring.bytes),
          first_(first),
          second_(second) {
        row_bytes_ = partition_.columns * static_cast<int>(sizeof(Element));
        seek();
    }

    // Starts the first loads of the block's part.
    __device__ void start() {
#pragma unroll 1
        for (int i = 0; i < depth_ - 1; ++i) load(i);
    }

  protected:
    static constexpr bool kIsInteger = sizeof(Element) == 1;
    static constexpr int kDistance = kIsInteger ? 1 : 8;  // of a lane's two columns

    // Finds this thread's first loads.
    __device__ void seek() {
        all_tiles_ = partition_.matrices * tiles_;
        const int vectors = all_tiles_ * kTileVectors;
        pitch_ = (vectors | 1) * static_cast<int>(sizeof(uint4));  // odd: eight rows are in all banks
        groups_ = kMaxGroups;
        while (groups_ > 1 &&
               (groups_ * all_tiles_ > kBatchWarps * kWarpTiles || kRowStages * kRows * groups_ * pitch_ > ring_bytes_))
            groups_ /= 2;
        stage_rows_ = kRows * groups_;
        depth_ = min(kMaxRowStages, ring_bytes_ / (stage_rows_ * pitch_));
        stages_ = is_valid() ? ceil_div(rows_, stage_rows_) : 0;
        next_ = 0;
#pragma unroll
        for (int i = 0; i < kMaxLoads; ++i) {
            const int at = threadIdx.x + i * kBatchThreads, row = at / vectors, vector = at - row * vectors;
            const bool second = vector >= tiles_ * kTileVectors;
            const char* const values = static_cast<const char*>((second ? second_ : first_).values);
            from_[i] = values + static_cast<size_t>(row_ + row) * row_bytes_ + column_ * sizeof(Element);
            from_[i] += (second ? vector - tiles_ * kTileVectors : vector) * sizeof(uint4);
            load_row_[i] = row < stage_rows_ ? row : partition_.rows;  // nothing to load
            to_[i] = row * pitch_ + vector * static_cast<int>(sizeof(uint4));
        }
    }

    // Adds the block's rows, and stores the sums in the place of the ring.
    __device__ void accumulate(const BatchInput& input) {
        const int sets = kBatchWarps / groups_, group = warp_ / sets, set = warp_ % sets;
        const float scale = input.scales[lane_ / 4];
        float sum[kWarpTiles][4] = {};
#pragma unroll 1
        for (int stage = 0, now = 0; stage < stages_; ++stage, now = now + 1 < depth_ ? now + 1 : 0) {
            wait();
            sync_batch();
            load(now > 0 ? now - 1 : depth_ - 1);      // where all warps have read the stage before
            const int part = stage * groups_ + group;  // of the rows
            if (part * kRows >= rows_) continue;
            Fragment rows[kFragments];
#pragma unroll
            for (int i = 0; i < kFragments; ++i) {
                const auto* const from = reinterpret_cast<const float4*>(input.fragments);
                const float4 x = from[(part * kFragments + i) * kWarp + lane_];
                rows[i] = make_fragment(x.x * scale, x.y * scale, x.z * scale, x.w * scale);
            }
            char* const weights = slot(now) + group * kRows * pitch_;
#pragma unroll
            for (int i = 0; i < kWarpTiles; ++i)
                if (set + i * sets < all_tiles_) multiply(sum[i], weights, set + i * sets, rows);
        }
        copy_wait<0>();
        sync_batch();
#pragma unroll
        for (int i = 0; i < kWarpTiles; ++i)
            if (set + i * sets < all_tiles_)
                sums(group, set + i * sets)[lane_] = make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
        sync_batch();
    }

    // The results of a tile in a lane, of the first matrix or the second: two columns of two sequences.
    __device__ float4 total(int matrix, int tile, int lane) const {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int group = 0; group < groups_; ++group) sum = sum + sums(group, matrix * tiles_ + tile)[lane];
        float2 scale = make_float2(kInputScale, kInputScale);
        if constexpr (kIsInteger) {
            const float* const scales = static_cast<const float*>((matrix == 0 ? first_ : second_).scales);
            scale.x *= scales[column_ + tile * kTile + column(lane)];
            scale.y *= scales[column_ + tile * kTile + column(lane) + kDistance];
        }
        return make_float4(sum.x * scale.x, sum.y * scale.x, sum.z * scale.y, sum.w * scale.y);
    }

    // The first of a lane's two columns of a tile.
    __device__ static int column(int lane) { return lane / 4 * (kIsInteger ? 2 : 1); }

  private:
    static constexpr int kRows = kIsInteger ? 32 : 16;  // of a group
    static constexpr int kFragments = kRows / kFragmentRows;
    static constexpr int kTileVectors = kTile * sizeof(Element) / sizeof(uint4);  // of a row of a tile
    static constexpr int kMaxLoads =
        kBatchWarps * kWarpTiles * kRows * kTileVectors / kBatchThreads;  // of a thread and stage

    // Waits for the oldest of the stages in flight.
    __device__ void wait() const {
        if (depth_ == 4)
            copy_wait<2>();
        else if (depth_ == 5)
            copy_wait<3>();
        else if (depth_ == 6)
            copy_wait<4>();
        else if (depth_ == 7)
            copy_wait<5>();
        else
            copy_wait<6>();
    }

    __device__ char* slot(int index) const { return ring_ + index * stage_rows_ * pitch_; }

    // Starts the loads of the next stage, if there is one.
    __device__ void load(int index) {
        if (next_ < stages_) {
            const int rows = rows_ - next_ * stage_rows_;
            const SharedAddress to = shared_address(slot(index));
#pragma unroll
            for (int i = 0; i < kMaxLoads; ++i) {
                if (load_row_[i] < rows) copy_async(to + to_[i], from_[i]);
                from_[i] += static_cast<ptrdiff_t>(stage_rows_) * row_bytes_;
            }
            ++next_;
        }
        copy_commit();
    }

    // Adds a tile of the rows of a group.
    __device__ void multiply(float (&sum)[4], char* weights, int tile, const Fragment (&rows)[kFragments]) const {
        const int lane = lane_;
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

    // The sums of a group's tile, one float4 for each lane.
    __device__ float4* sums(int group, int tile) const {
        return reinterpret_cast<float4*>(ring_) + (group * all_tiles_ + tile) * kWarp;
    }

    int lane_, warp_;  // of this thread
    char* ring_;
    int ring_bytes_, row_bytes_;
    const TangoMatrix &first_, &second_;
    int all_tiles_;                            // of both matrices
    int pitch_;                                // bytes of a row in the ring
    int groups_, stage_rows_, depth_;          // of a stage; number of slots
    int stages_, next_;                        // number of stages, and the next to be loaded
    const char* from_[kMaxLoads];              // what the thread loads of it
    int load_row_[kMaxLoads], to_[kMaxLoads];  // their rows in a stage, and places in a slot
};

}  // namespace tango
