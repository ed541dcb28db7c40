// Index and value of the largest logit (tango/argmax.h). One block suffices for a row: 150,000 logits are 0.6 MB, while
// a decode step reads hundreds of MB of weights.
#include "common/check.h"
#include "common/device.h"
#include "common/rank.cuh"

namespace tango {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarp;

struct Job {
    const float* rows[TANGO_ARGMAX_ROWS];
    int size;
    TangoArgmax* argmax;  // [rows]
};

__global__ void __launch_bounds__(kThreads) find_argmax(Job job) {
    const float* const values = job.rows[blockIdx.x];
    auto* warp_ranks = reinterpret_cast<Rank*>(shared_memory());
    Rank best = 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < job.size; i += kThreads) {
        const Rank rank = rank_of(values[i], i);
        best = rank > best ? rank : best;
    }
    best = warp_max_rank(best);
    if (lane_id() == 0) warp_ranks[warp_id()] = best;
    __syncthreads();
    if (warp_id() != 0) return;
    best = warp_max_rank(warp_ranks[lane_id()]);
    if (lane_id() != 0) return;
    const int index = index_of(best);
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
    constexpr size_t kSharedBytes = kWarps * sizeof(Rank);
    return cuda_status(launch(find_argmax, job, count, kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)),
                       "argmax");
}
