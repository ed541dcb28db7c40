// Rows in another order (tango/rows.h): a block copies a row.
#include <climits>
#include <cstdint>

#include "common/check.h"
#include "common/device.h"
#include "common/platform.cuh"
#include "tango/rows.h"

namespace tango {
namespace {

constexpr int kThreads = 128;

struct Job {
    const void *rows, *filler;
    const int32_t* order;
    void* gathered;
    int64_t row_bytes;
};

template <typename V>
__global__ void __launch_bounds__(kThreads) gather(Job job) {
    const int64_t width = job.row_bytes / sizeof(V);
    const int64_t from = job.order[blockIdx.x];
    const V* source = from < 0 ? static_cast<const V*>(job.filler) : static_cast<const V*>(job.rows) + from * width;
    V* to = static_cast<V*>(job.gathered) + blockIdx.x * width;
    for (int64_t i = threadIdx.x; i < width; i += kThreads) to[i] = source[i];
}

cudaError_t launch_widest(const Job& job, int count, cudaStream_t stream) {
    constexpr int64_t kBytes = sizeof(uint4);
    const auto bits = reinterpret_cast<uintptr_t>(job.rows) | reinterpret_cast<uintptr_t>(job.filler) |
                      reinterpret_cast<uintptr_t>(job.gathered) | static_cast<uintptr_t>(job.row_bytes);
    return bits % kBytes == 0 ? launch(gather<uint4>, job, count, kThreads, 0, stream)
                              : launch(gather<uint16_t>, job, count, kThreads, 0, stream);
}

}  // namespace
}  // namespace tango

int tango_rows_gather_enqueue(const void* rows, const void* filler, const int32_t* order, int32_t count,
                              int64_t row_bytes, void* gathered, void* stream) {
    using namespace tango;
    if (int status = check_ranges({{"count", count, 0, INT_MAX}, {"row_bytes", row_bytes, 2, INT_MAX}})) return status;
    if (row_bytes % 2)
        return fail(TANGO_BAD_ARGUMENT, "row_bytes is %lld: it must be even", static_cast<long long>(row_bytes));
    if (count == 0) return TANGO_OK;
    if (int status = check_pointer("rows", rows, 2)) return status;
    if (int status = check_pointer("filler", filler, 2)) return status;
    if (int status = check_pointer("order", order, alignof(int32_t))) return status;
    if (int status = check_pointer("gathered", gathered, 2)) return status;
    const Job job{rows, filler, order, gathered, row_bytes};
    return cuda_status(launch_widest(job, count, static_cast<cudaStream_t>(stream)), "gather of rows");
}
