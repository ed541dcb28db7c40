// Replaces src/common/platform.cuh of the CUDA library: kernels run on a CPU, with one thread per GPU thread.
//
// Copies to shared memory arrive as late as possible: when their own thread waits for them. Until then the memory holds
// NaN, so a thread that reads too early computes NaN. With TANGO_EARLY_COPIES they arrive at once. Then a copy that
// overwrites what others still read is a race, which ThreadSanitizer reports.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <linux/futex.h>
#include <math.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

// A std::barrier whose threads sleep at once. There are far more of them than cores, so waiting awake takes the time of
// those that are waited for.
class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads), missing_(threads) {}

    // The phase that this thread has arrived in.
    uint32_t arrive() {
        const uint32_t phase = phase_.load();
        if (missing_.fetch_sub(1) == 1) {
            missing_.store(threads_);
            phase_.store(phase + 1);
            syscall(SYS_futex, &phase_, FUTEX_WAKE_PRIVATE, threads_, nullptr);
        }
        return phase;
    }

    void arrive_and_wait() {
        const uint32_t phase = arrive();
        while (phase_.load() == phase) syscall(SYS_futex, &phase_, FUTEX_WAIT_PRIVATE, phase, nullptr);
    }

  private:
    const int threads_;
    std::atomic<int> missing_;
    std::atomic<uint32_t> phase_ = 0;
};

// The lanes of a warp exchange values through this.
struct Warp {
    Barrier barrier{32};
    uint64_t values[32];
    char* addresses[32];
    uint32_t left[32][4], right[32][2];
};

class Block {
  public:
    Block(int threads, size_t shared_bytes)
        : all(threads), warps(threads / 32), shared(shared_bytes / sizeof(float4) + 1), left(threads) {
        std::memset(shared.data(), 0xff, shared.size() * sizeof(float4));  // NaN
        for (int group = 0; group < threads / 128; ++group) warpgroups.emplace_back(128);
    }

    Barrier& named_barrier(int id, int threads) {
        if (Barrier* found = named_[id].load()) return *found;
        const std::lock_guard<std::mutex> lock(naming_);
        if (named_[id].load() == nullptr) named_[id] = owned_.emplace_back(new Barrier(threads)).get();
        return *named_[id].load();
    }

    Barrier all;
    std::deque<Warp> warps;
    std::deque<Barrier> warpgroups;
    std::vector<float4> shared;
    std::vector<std::array<uint32_t, 4>> left;  // operands of the threads' warpgroups

  private:
    std::array<std::atomic<Barrier*>, 16> named_ = {};
    std::vector<std::unique_ptr<Barrier>> owned_;
    std::mutex naming_;
};

inline thread_local Block* block;
inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 gridDim;

using std::max;
using std::min;
#define __launch_bounds__(...)

inline Warp& warp() { return block->warps[threadIdx.x / 32]; }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int offset) {
    std::memcpy(&warp().values[threadIdx.x % 32], &value, sizeof(T));
    warp().barrier.arrive_and_wait();
    std::memcpy(&value, &warp().values[threadIdx.x % 32 ^ offset], sizeof(T));
    warp().barrier.arrive_and_wait();
    return value;
}

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
    return __shfl_xor_sync(0, value, static_cast<int>(threadIdx.x % 32) ^ from);
}

inline bool __any_sync(unsigned, bool value) {
    for (int offset = 16; offset > 0; offset /= 2) value |= __shfl_xor_sync(0, value, offset);
    return value;
}

inline void __syncwarp() { warp().barrier.arrive_and_wait(); }
inline void __syncthreads() { block->all.arrive_and_wait(); }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return std::atomic_ref(*to).fetch_add(value); }
template <typename T>
T atomicExch(T* to, T value) {
    return std::atomic_ref(*to).exchange(value);
}
inline unsigned long long atomicMax(unsigned long long* to, unsigned long long value) {
    std::atomic_ref shared(*to);
    unsigned long long before = shared.load();
    while (before < value && !shared.compare_exchange_weak(before, value)) {
    }
    return before;
}
inline void __threadfence() {}  // atomics are sequentially consistent
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline int __float2int_rn(float x) { return x == x ? static_cast<int>(std::rint(std::clamp(x, -2e9f, 2e9f))) : 0; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }

inline __half2 __hfma2(const __half2& a, const __half2& b, const __half2& c) {
    const float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
    return __floats2half2_rn(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = low | uint64_t{high} << 32;
    unsigned chosen = 0;
    for (int i = 0; i < 4; ++i) chosen |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return chosen;
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

template <typename T>
T __ldcg(const T* from) {
    return *from;
}

template <typename T>
T __ldcv(const T* from) {
    return *from;
}

template <typename T>
void __stcg(T* to, T value) {
    *to = value;
}

#include "common/fp8.cuh"
#include "common/warp.cuh"

namespace tango {

// Asynchronous copies.

struct Copy {
    char* to;
    const void* from;
    int bytes;
};
inline thread_local std::vector<Copy> open_copies;
inline thread_local std::deque<std::vector<Copy>> copy_groups;

using SharedAddress = char*;

template <typename T>
SharedAddress shared_address(T* pointer) {
    return reinterpret_cast<char*>(pointer);
}

inline void* shared_pointer(SharedAddress address) { return address; }

inline void start_copy(const Copy& copy) {
#ifdef TANGO_EARLY_COPIES
    std::memcpy(copy.to, copy.from, copy.bytes);
#else
    open_copies.push_back(copy);
#endif
}

inline void copy_async(SharedAddress to, const void* from) { start_copy({to, from, 16}); }

inline void copy_async_pair(SharedAddress to, const void* from) { start_copy({to, from, 8}); }

inline void copy_async_word(SharedAddress to, const void* from) { start_copy({to, from, 4}); }

inline void copy_async_cached(SharedAddress to, const void* from) { copy_async(to, from); }

inline void copy_async_prefetch(SharedAddress to, const void* from) { copy_async(to, from); }

inline void copy_commit() { copy_groups.push_back(std::exchange(open_copies, {})); }

template <int kPending>
void copy_wait() {
    for (; copy_groups.size() > kPending; copy_groups.pop_front())
        for (const Copy& copy : copy_groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}

inline float exp2_fast(float x) { return std::exp2(x); }

// Tensor cores.

inline float half_of(uint32_t pair, int which) {
    return __half2float(__half(__half_raw{static_cast<unsigned short>(pair >> 16 * which)}));
}

inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const int lane = lane_id();
    std::copy(a, a + 4, warp().left[lane]);
    std::copy(b, b + 2, warp().right[lane]);
    warp().barrier.arrive_and_wait();
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) {
            const int holder = k % 8 / 2, upper = k / 8, row = lane / 4, column = lane % 4 * 2 + i % 2;
            c[i] += half_of(warp().left[row * 4 + holder][i / 2 + 2 * upper], k % 2) *
                    half_of(warp().right[column * 4 + holder][upper], k % 2);
        }
    warp().barrier.arrive_and_wait();
}

inline void mma(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const int lane = lane_id();
    std::copy(a, a + 4, warp().left[lane]);
    std::copy(b, b + 2, warp().right[lane]);
    warp().barrier.arrive_and_wait();
    const auto byte_of = [](uint32_t word, int which) { return static_cast<int8_t>(word >> 8 * which); };
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 32; ++k) {
            const int holder = k % 16 / 4, upper = k / 16, row = lane / 4, column = lane % 4 * 2 + i % 2;
            c[i] += byte_of(warp().left[row * 4 + holder][i / 2 + 2 * upper], k % 4) *
                    byte_of(warp().right[column * 4 + holder][upper], k % 4);
        }
    warp().barrier.arrive_and_wait();
}

inline void load_matrices(uint32_t (&registers)[4], SharedAddress address) {
    warp().addresses[lane_id()] = address;
    warp().barrier.arrive_and_wait();
    for (int m = 0; m < 4; ++m)
        std::memcpy(&registers[m], warp().addresses[8 * m + lane_id() / 4] + lane_id() % 4 * 4, 4);
    warp().barrier.arrive_and_wait();
}

inline void load_transposed(uint32_t (&registers)[4], SharedAddress address) {
    warp().addresses[lane_id()] = address;
    warp().barrier.arrive_and_wait();
    for (int m = 0; m < 4; ++m)
        for (int i = 0; i < 2; ++i) {
            const char* row = warp().addresses[8 * m + lane_id() % 4 * 2 + i];
            std::memcpy(reinterpret_cast<char*>(&registers[m]) + 2 * i, row + lane_id() / 4 * 2, 2);
        }
    warp().barrier.arrive_and_wait();
}

inline void store_matrices(const uint32_t (&registers)[2], SharedAddress address) {
    warp().addresses[lane_id()] = address;
    warp().barrier.arrive_and_wait();
    for (int m = 0; m < 2; ++m)
        std::memcpy(warp().addresses[8 * m + lane_id() / 4] + lane_id() % 4 * 4, &registers[m], 4);
    warp().barrier.arrive_and_wait();
}

// Hopper's warpgroup products with a left operand in registers. They are done at once.

inline void wgmma_publish() {}
inline void wgmma_begin() {}
inline void wgmma_commit() {}

template <int kPending>
void wgmma_wait() {}

template <typename Registers>
void wgmma_hold(Registers&) {}

// Rows of 128 bytes that begin at a multiple of 1024, swizzled by words of 16; the address is in the first one. An
// element is at a place along the sum and in a column of the product.
struct SwizzledRows {
    SharedAddress address;

    const __half* at(int k, int column) const {
        const auto number = reinterpret_cast<uintptr_t>(address);
        const int word = number % 128 / 16 + k / 8;
        return reinterpret_cast<const __half*>(address - number % 128 + column * 128 + (word ^ column % 8) * 16) +
               k % 8;
    }
};

// Columns of words, a pitch apart.
struct PitchedRows {
    SharedAddress address;
    int pitch;

    const __half* at(int k, int column) const {
        return reinterpret_cast<const __half*>(address + k / 8 * pitch + column * 16) + k % 8;
    }
};

struct PitchedColumns {
    SharedAddress address;
    int pitch;

    const __half* at(int k, int column) const {
        return reinterpret_cast<const __half*>(address + column / 8 * pitch + k * 16) + column % 8;
    }
};

template <int kWords>
SwizzledRows wgmma_operand(SharedAddress address) {
    static_assert(kWords == 8);
    return {address};
}

template <int kPitch>
PitchedRows wgmma_rows(SharedAddress address) {
    return {address, kPitch};
}

template <int kPitch>
PitchedColumns wgmma_columns(SharedAddress address) {
    return {address, kPitch};
}

template <int kAccumulators, typename Right>
void wgmma(float (&c)[kAccumulators], const uint32_t (&a)[4], const Right& b, int accumulate = 1) {
    const int group = threadIdx.x / 128, first = group * 128 + threadIdx.x % 128 / 32 * 32 + lane_id() / 4 * 4;
    std::copy(a, a + 4, block->left[threadIdx.x].begin());
    block->warpgroups[group].arrive_and_wait();
    for (int i = 0; i < kAccumulators; ++i) {
        const int upper = i / 2 % 2, column = i / 4 * 8 + lane_id() % 4 * 2 + i % 2;
        float sum = accumulate ? c[i] : 0.0f;
        for (int k = 0; k < 16; ++k)
            sum += half_of(block->left[first + k % 8 / 2][upper + k / 8 * 2], k % 2) * __half2float(*b.at(k, column));
        c[i] = sum;
    }
    block->warpgroups[group].arrive_and_wait();
}

template <int kRegisters>
void keep_registers() {}

template <int kRegisters>
void take_registers() {}

// Barriers in shared memory: the current phase, how many arrivals it misses, and how many it has.

struct MemoryBarrier {
    uint32_t phase;
    uint16_t missing, arrivals;
};

inline void mbarrier_init(SharedAddress address, int arrivals) {
    const auto count = static_cast<uint16_t>(arrivals);
    *reinterpret_cast<MemoryBarrier*>(address) = {0, count, count};
}

inline void mbarrier_publish() {}

inline void mbarrier_arrive(SharedAddress address) {
    auto& barrier = *reinterpret_cast<MemoryBarrier*>(address);
    if (std::atomic_ref(barrier.missing).fetch_sub(1) > 1) return;
    std::atomic_ref(barrier.missing).store(barrier.arrivals);
    std::atomic_ref(barrier.phase).fetch_add(1);
    syscall(SYS_futex, &barrier.phase, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr);
}

inline void mbarrier_wait(SharedAddress address, uint32_t parity) {
    auto& phase = reinterpret_cast<MemoryBarrier*>(address)->phase;
    for (uint32_t now; (now = std::atomic_ref(phase).load()) % 2 == parity;)
        syscall(SYS_futex, &phase, FUTEX_WAIT_PRIVATE, now, nullptr);
}

// Named barriers, and the memory operations of a barrier of the grid.

template <int kId, int kThreads>
void named_barrier_sync() {
    block->named_barrier(kId, kThreads).arrive_and_wait();
}

template <int kId, int kThreads>
void named_barrier_arrive() {
    static_cast<void>(block->named_barrier(kId, kThreads).arrive());
}

template <int kThreads>
void named_barrier_sync(int id) {
    block->named_barrier(id, kThreads).arrive_and_wait();
}

template <int kThreads>
void named_barrier_arrive(int id) {
    static_cast<void>(block->named_barrier(id, kThreads).arrive());
}

inline unsigned load_acquire(unsigned* from) {
    std::this_thread::yield();
    return std::atomic_ref(*from).load();
}

inline unsigned load_acquire_system(const unsigned* from) { return load_acquire(const_cast<unsigned*>(from)); }

inline void add_one_release(unsigned* to) { std::atomic_ref(*to).fetch_add(1); }

inline unsigned add_one_acq_rel(unsigned* to) { return std::atomic_ref(*to).fetch_add(1); }

inline void prefetch_l2(const void*) {}

// Launches.

inline float4* shared_memory() { return block->shared.data(); }

// Runs some blocks of a kernel at the same time: `blocks`, which begin with number `first` of a grid of `grid` blocks.
template <typename Argument>
void run(void (*kernel)(Argument), const Argument& argument, std::deque<Block>& blocks, int threads_per_block,
         int first, int grid) {
    std::vector<std::thread> threads;
    for (int i = 0; i < static_cast<int>(blocks.size()) * threads_per_block; ++i)
        threads.emplace_back([&, i] {
            block = &blocks[i / threads_per_block], gridDim.x = grid;
            threadIdx.x = i % threads_per_block, blockIdx.x = first + i / threads_per_block;
            kernel(argument);
        });
    for (std::thread& thread : threads) thread.join();
}

// One block after the other, because none waits for another.
template <typename Argument>
cudaError_t launch(void (*kernel)(Argument), Argument argument, int blocks, int threads, size_t shared, cudaStream_t) {
    for (int b = 0; b < blocks; ++b) {
        std::deque<Block> one;
        one.emplace_back(threads, shared);
        run(kernel, argument, one, threads, b, blocks);
    }
    return cudaSuccess;
}

template <typename Argument>
cudaError_t launch_cooperative(void (*kernel)(Argument), Argument argument, int blocks, int threads, size_t shared,
                               cudaStream_t) {
    std::deque<Block> all;
    for (int b = 0; b < blocks; ++b) all.emplace_back(threads, shared);
    run(kernel, argument, all, threads, 0, blocks);
    return cudaSuccess;
}

}  // namespace tango
