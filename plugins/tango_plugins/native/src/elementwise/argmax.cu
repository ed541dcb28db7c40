// Index and value of the largest logit (tango/argmax.h). One block suffices for a row: 150,000 logits are 0.6 MB, while
// a decode step reads hundreds of MB of weights.
#include "common/check.h"
#include "common/device.h"
#include "common/platform.cuh"
#include "tango/argmax.h"

namespace tango {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarp;

struct Job {
    const float* rows[TANGO_ARGMAX_ROWS];
    int size;
    TangoArgmax* argmax;  // [rows]
};

// Orders pairs as integers: by value, then the lower index first. NaN is above all numbers.
__device__ inline unsigned long long rank_of(float value, int index) {
    const unsigned bits = __float_as_uint(value + 0.0f);  // -0 equals 0
    const unsigned ordered = isnan(value) ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - static_cast<unsigned>(index));
}

__device__ inline unsigned long long warp_max_rank(unsigned long long rank) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const unsigned long long other = __shfl_xor_sync(kAllLanes, rank, offset);
        rank = other > rank ? other : rank;
    }
    return rank;
}

__global__ void __launch_bounds__(kThreads) find_argmax(Job job) {
    const float* const values = job.rows[blockIdx.x];
    auto* warp_ranks = reinterpret_cast<unsigned long long*>(shared_memory());
    unsigned long long best = 0;  // below the rank of every value
#pragma unroll 8
    for (int i = threadIdx.x; i < job.size; i += kThreads) {
        const unsigned long long rank = rank_of(values[i], i);
        best = rank > best ? rank : best;
    }
    best = warp_max_rank(best);
    if (lane_id() == 0) warp_ranks[warp_id()] = best;
    __syncthreads();
    if (warp_id() != 0) return;
    best = warp_max_rank(warp_ranks[lane_id()]);
    if (lane_id() != 0) return;
    const int index = static_cast<int>(0xffffffffu - static_cast<unsigned>(best));
    job.argmax[blockIdx.x] = {index, values[index]};
}

}  // namespace
}  // namespace tango

int tango_argmax_enqueue(const float* values, int32_t size, TangoArgmax* argmax, void* stream) {
    return tango_argmax_rows_enqueue(&values, 1, size, argmax, stream);
}

int tango_argmax_rows_enqueue(const float* const* rows, int32_t count, int32_t size, TangoArgmax* argmax,
                              void* stream) {
    using namespace tango;
    if (int status = check_pointer("rows", rows, alignof(float*))) return status;
    if (int status = check_ranges({{"count", count, 1, TANGO_ARGMAX_ROWS}, {"size", size, 1, INT32_MAX}}))
        return status;
    if (int status = check_pointer("argmax", argmax, alignof(TangoArgmax))) return status;
    Job job = {{}, size, argmax};
    for (int i = 0; i < count; ++i) {
        if (int status = check_pointer("values", rows[i], alignof(float))) return status;
        job.rows[i] = rows[i];
    }
    constexpr size_t kSharedBytes = kWarps * sizeof(unsigned long long);
    return cuda_status(launch(find_argmax, job, count, kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)),
                       "argmax");
}
