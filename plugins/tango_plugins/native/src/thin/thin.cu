// Inner pruning (tango/thin.h): which rows stay, to which of these each other row is most similar, and their weighted
// means.
//
// With 2,000 rows of width 3584, the inner products are 7 GFLOP in fp32, and all else is little beside them.
#include <algorithm>
#include <climits>
#include <cstdint>
#include <type_traits>

#include "common/check.h"
#include "common/device.h"
#include "common/platform.cuh"
#include "tango/thin.h"

namespace tango {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTile = 64, kDepth = 16, kEach = kTile / 16;  // a thread has kEach rows and columns of a tile
constexpr int kPitch = kTile + 1;                           // so that a warp's stores go to different banks
constexpr size_t kAlignment = 256;

// Inside of the workspace. Places count the video's rows, ranks go by share.
struct Scratch {
    int32_t* rank;             // [V]
    int32_t* chosen;           // [kept] rank → place
    int32_t* ascending;        // [kept] the chosen places, ascending
    int32_t* rest;             // [V - kept] the other places, ascending
    float* inverse;            // [V] 1 / norm
    unsigned long long* best;  // [tiles of the chosen, V - kept] nearest chosen row in each tile
    int32_t* owner;            // [V - kept] rank of the row that it joins
};

struct Job {
    TangoThinShape shape;
    TangoThinTensors tensors;
    Scratch scratch;
};

int tiles(int rows) { return ceil_div(rows, kTile); }

// Lays the scratch memory out from an address on; returns its size.
size_t lay_out(const TangoThinShape& s, char* memory, Scratch& scratch) {
    size_t used = 0;
    const auto take = [&](auto*& pointer, size_t count) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + used);
        used = (used + count * sizeof(*pointer) + kAlignment - 1) / kAlignment * kAlignment;
    };
    const size_t video = s.video_rows, kept = s.kept, rest = video - kept;
    take(scratch.rank, video);
    take(scratch.chosen, kept);
    take(scratch.ascending, kept);
    take(scratch.rest, rest);
    take(scratch.inverse, video);
    take(scratch.best, tiles(s.kept) * rest);
    take(scratch.owner, rest);
    return used;
}

// A number's order as an unsigned integer; NaN is above all, so that every order is total.
__device__ inline unsigned order_of(float value) {
    const unsigned bits = __float_as_uint(value + 0.0f);  // -0 equals 0
    return isnan(value) ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

template <typename T>
__device__ inline const T* video_row(const Job& job, int place) {
    const int64_t row = job.shape.begin + place;
    return static_cast<const T*>(job.tensors.prompt) + row * job.shape.width;
}

// How many of the video's rows have a larger share, or an equal one and come first.
__global__ void __launch_bounds__(kThreads) rank_rows(Job job) {
    const int place = blockIdx.x * kThreads + threadIdx.x, count = job.shape.video_rows;
    if (place >= count) return;
    const float* share = job.tensors.share + job.shape.begin;
    const unsigned own = order_of(share[place]);
    int rank = 0;
    for (int i = 0; i < count; ++i) {
        const unsigned other = order_of(share[i]);
        rank += other > own || (other == own && i < place);
    }
    job.scratch.rank[place] = rank;
    if (rank < job.shape.kept) job.scratch.chosen[rank] = place;
}

// The places of the rows that stay and of the others, both ascending; where each row of the result comes from.
__global__ void __launch_bounds__(kThreads) list_rows(Job job) {
    const TangoThinShape& s = job.shape;
    const int row = blockIdx.x * kThreads + threadIdx.x, place = row - s.begin;
    if (row >= s.rows) return;
    if (place < 0) {
        job.tensors.stay[row] = row;
    } else if (place >= s.video_rows) {
        job.tensors.stay[row - s.video_rows + s.kept] = row;
    } else {
        int before = 0;
        for (int i = 0; i < place; ++i) before += job.scratch.rank[i] < s.kept;
        if (job.scratch.rank[place] < s.kept) {
            job.scratch.ascending[before] = place;
            job.tensors.stay[s.begin + before] = row;
        } else {
            job.scratch.rest[place - before] = place;
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) invert_norms(Job job) {
    const int place = blockIdx.x * kWarps + warp_id();
    if (place >= job.shape.video_rows) return;
    const T* row = video_row<T>(job, place);
    float sum = 0.0f;
    for (int i = lane_id(); i < job.shape.width; i += kWarp) {
        const float x = static_cast<float>(row[i]);
        sum += x * x;
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) job.scratch.inverse[place] = 1.0f / fmaxf(sqrtf(sum), 1e-12f);
}

// One tile of the cosines of the other rows with those that stay: for each row its nearest in the tile, as an integer
// that is larger for a larger cosine, then for a lower rank.
template <typename T>
__global__ void __launch_bounds__(kThreads) find_nearest(Job job) {
    const TangoThinShape& s = job.shape;
    const int rest = s.video_rows - s.kept, columns = ceil_div(s.kept, kTile);
    const int r0 = blockIdx.x / columns * kTile, c0 = blockIdx.x % columns * kTile;
    float* left = reinterpret_cast<float*>(shared_memory());  // [kDepth][kPitch] of the other rows
    float* right = left + kDepth * kPitch;                    // of the rows that stay
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    float sum[kEach][kEach] = {};
    for (int d0 = 0; d0 < s.width; d0 += kDepth) {
        for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
            const int row = i / kDepth, d = i % kDepth;
            const bool inside = d0 + d < s.width;
            const bool has_left = inside && r0 + row < rest, has_right = inside && c0 + row < s.kept;
            left[d * kPitch + row] =
                has_left ? static_cast<float>(video_row<T>(job, job.scratch.rest[r0 + row])[d0 + d]) : 0.0f;
            right[d * kPitch + row] =
                has_right ? static_cast<float>(video_row<T>(job, job.scratch.chosen[c0 + row])[d0 + d]) : 0.0f;
        }
        __syncthreads();
        for (int d = 0; d < kDepth; ++d)
            for (int i = 0; i < kEach; ++i)
                for (int j = 0; j < kEach; ++j)
                    sum[i][j] += left[d * kPitch + ty + 16 * i] * right[d * kPitch + tx + 16 * j];
        __syncthreads();
    }
    auto* nearest = reinterpret_cast<unsigned long long*>(shared_memory());  // [kTile][16]
    for (int i = 0; i < kEach; ++i) {
        unsigned long long best = 0;
        const int r = r0 + ty + 16 * i;
        for (int j = 0; j < kEach; ++j) {
            const int rank = c0 + tx + 16 * j;
            if (r >= rest || rank >= s.kept) continue;
            const float scale = job.scratch.inverse[job.scratch.chosen[rank]];
            const float cosine = sum[i][j] * scale * job.scratch.inverse[job.scratch.rest[r]];
            const unsigned long long found =
                static_cast<unsigned long long>(order_of(cosine)) << 32 | (0xffffffffu - static_cast<unsigned>(rank));
            best = found > best ? found : best;
        }
        nearest[(ty + 16 * i) * 16 + tx] = best;
    }
    __syncthreads();
    const int row = threadIdx.x;
    if (row >= kTile || r0 + row >= rest) return;
    unsigned long long best = 0;
    for (int i = 0; i < 16; ++i) best = nearest[row * 16 + i] > best ? nearest[row * 16 + i] : best;
    job.scratch.best[static_cast<int64_t>(c0 / kTile) * rest + r0 + row] = best;
}

__global__ void __launch_bounds__(kThreads) find_owners(Job job) {
    const TangoThinShape& s = job.shape;
    const int row = blockIdx.x * kThreads + threadIdx.x, rest = s.video_rows - s.kept;
    if (row >= rest) return;
    unsigned long long best = 0;
    for (int tile = 0; tile < ceil_div(s.kept, kTile); ++tile) {
        const unsigned long long found = job.scratch.best[static_cast<int64_t>(tile) * rest + row];
        best = found > best ? found : best;
    }
    job.scratch.owner[row] = static_cast<int>(0xffffffffu - static_cast<unsigned>(best));
}

// A block for each row of the result.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge_rows(Job job) {
    const TangoThinShape& s = job.shape;
    const int row = blockIdx.x, kept = row - s.begin, rest = s.video_rows - s.kept;
    const int64_t from = kept < 0 ? row : row + rest;
    T* to = static_cast<T*>(job.tensors.thinned) + static_cast<int64_t>(row) * s.width;
    if (kept < 0 || kept >= s.kept) {
        const T* source = static_cast<const T*>(job.tensors.prompt) + from * s.width;
        for (int i = threadIdx.x; i < s.width; i += kThreads) to[i] = source[i];
        return;
    }
    const int place = job.scratch.ascending[kept], rank = job.scratch.rank[place];
    const T* own = video_row<T>(job, place);
    for (int i = threadIdx.x; i < s.width; i += kThreads) {
        const float x = static_cast<float>(own[i]);
        float total = x;
        int members = 1;
        for (int r = 0; r < rest; ++r) {
            if (job.scratch.owner[r] != rank) continue;
            total += static_cast<float>(video_row<T>(job, job.scratch.rest[r])[i]);
            ++members;
        }
        const float merged = 0.6f * x + 0.4f * (total / static_cast<float>(members));
        to[i] = static_cast<T>(members == 1 ? x : merged);
    }
}

int check_shape(const TangoThinShape* shape) {
    if (int status = check_pointer("shape", shape, 1)) return status;
    const TangoThinShape& s = *shape;
    return check_ranges({{"rows", s.rows, 1, INT_MAX / 2},
                         {"begin", s.begin, 0, s.rows},
                         {"video_rows", s.video_rows, 0, s.rows - s.begin},
                         {"kept", s.kept, 0, s.video_rows},
                         {"width", s.width, 1, INT_MAX},
                         {"dtype", s.dtype, TANGO_FP16, TANGO_FP32}});
}

template <typename T>
cudaError_t launch_all(const Job& job, cudaStream_t stream) {
    const TangoThinShape& s = job.shape;
    const int rest = s.video_rows - s.kept;
    cudaError_t error = cudaSuccess;
    const auto enqueue = [&](void (*kernel)(Job), int blocks, size_t shared = 0) {
        if (error == cudaSuccess && blocks > 0) error = launch(kernel, job, blocks, kThreads, shared, stream);
    };
    enqueue(rank_rows, ceil_div(s.video_rows, kThreads));
    enqueue(list_rows, ceil_div(s.rows, kThreads));
    if (s.kept > 0 && rest > 0) {
        enqueue(invert_norms<T>, ceil_div(s.video_rows, kWarps));
        constexpr size_t kOperands = sizeof(float) * 2 * kDepth * kPitch;
        constexpr size_t kShared = std::max(kOperands, sizeof(unsigned long long) * kTile * 16);
        enqueue(find_nearest<T>, tiles(rest) * tiles(s.kept), kShared);
        enqueue(find_owners, ceil_div(rest, kThreads));
    }
    enqueue(merge_rows<T>, s.rows - rest);
    return error;
}

}  // namespace
}  // namespace tango

int tango_thin_workspace(const TangoThinShape* shape, size_t* bytes) {
    using namespace tango;
    if (int status = check_shape(shape)) return status;
    if (int status = check_pointer("bytes", bytes, alignof(size_t))) return status;
    Scratch scratch;
    *bytes = lay_out(*shape, nullptr, scratch);
    return TANGO_OK;
}

int tango_thin_enqueue(const TangoThinShape* shape, const TangoThinTensors* tensors, void* workspace,
                       size_t workspace_bytes, void* stream) {
    using namespace tango;
    if (int status = check_shape(shape)) return status;
    if (int status = check_pointer("tensors", tensors, 1)) return status;
    const size_t item = shape->dtype == TANGO_FP16 ? 2 : 4;
    if (int status = check_pointer("prompt", tensors->prompt, item)) return status;
    if (int status = check_pointer("share", tensors->share, alignof(float))) return status;
    if (int status = check_pointer("thinned", tensors->thinned, item)) return status;
    if (int status = check_pointer("stay", tensors->stay, alignof(int32_t))) return status;
    Job job{*shape, *tensors, {}};
    const size_t needed = lay_out(*shape, static_cast<char*>(workspace), job.scratch);
    if (workspace_bytes < needed)
        return fail(TANGO_SMALL_WORKSPACE, "workspace has %zu bytes: it needs %zu", workspace_bytes, needed);
    if (needed > 0)
        if (int status = check_pointer("workspace", workspace, kAlignment)) return status;
    const auto on = static_cast<cudaStream_t>(stream);
    return cuda_status(shape->dtype == TANGO_FP16 ? launch_all<__half>(job, on) : launch_all<float>(job, on),
                       "inner pruning");
}
