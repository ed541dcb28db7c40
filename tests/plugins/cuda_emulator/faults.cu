// A kernel with deliberate faults, which the emulator must find.
#include "common/platform.cuh"

namespace {

constexpr int kThreads = 64, kFloats = 4 * kThreads;

enum Fault { kNone, kNoWait, kNoBarrier };

struct Job {
    const float* from;
    float* to;
    int fault;
};

// Reverses kFloats numbers: each thread copies four to shared memory, and reads four that another thread has copied.
__global__ void reverse(Job job) {
    float* shared = reinterpret_cast<float*>(tango::shared_memory());
    const int first = 4 * threadIdx.x;
    tango::copy_async(tango::shared_address(shared + first), job.from + first);
    tango::copy_commit();
    if (job.fault != kNoWait) tango::copy_wait<0>();
    if (job.fault != kNoBarrier) __syncthreads();
    for (int i = first; i < first + 4; ++i) job.to[i] = shared[kFloats - 1 - i];
}

}  // namespace

extern "C" int emulator_reverse(const float* from, float* to, int fault) {
    return tango::launch(reverse, Job{from, to, fault}, 1, kThreads, kFloats * sizeof(float), nullptr);
}
