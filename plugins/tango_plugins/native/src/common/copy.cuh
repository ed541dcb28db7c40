// Asynchronous copies to shared memory. From sm_80 on they are cp.async, before that plain loads and stores.
#pragma once

#include <cstdint>

namespace tango {

using SharedAddress = uint32_t;

__device__ inline SharedAddress shared_address(const void* pointer) {
    return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

__device__ inline void* shared_pointer(SharedAddress address) { return __cvta_shared_to_generic(address); }

// 16 bytes from global to shared memory.
__device__ inline void copy_async(SharedAddress to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(to), "l"(from) : "memory");
#else
    const uint4 value = *static_cast<const uint4*>(from);
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};\n" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
#endif
}

// The same through the L1 cache, from sm_80 on. Past it, threads whose 16 bytes are neighbors in global memory but not
// in shared memory read the same sector each on their own.
__device__ inline void copy_async_cached(SharedAddress to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;\n" ::"r"(to), "l"(from) : "memory");
}

// As copy_async(); from sm_80 on, the L2 cache also reads the 256 bytes around, for threads that take them soon.
__device__ inline void copy_async_prefetch(SharedAddress to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;\n" ::"r"(to), "l"(from) : "memory");
#else
    copy_async(to, from);
#endif
}

// 8 bytes.
__device__ inline void copy_async_pair(SharedAddress to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;\n" ::"r"(to), "l"(from) : "memory");
#else
    const uint2 value = *static_cast<const uint2*>(from);
    asm volatile("st.shared.v2.u32 [%0], {%1,%2};\n" ::"r"(to), "r"(value.x), "r"(value.y) : "memory");
#endif
}

// 4 bytes.
__device__ inline void copy_async_word(SharedAddress to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(to), "l"(from) : "memory");
#else
    asm volatile("st.shared.u32 [%0], %1;\n" ::"r"(to), "r"(*static_cast<const uint32_t*>(from)) : "memory");
#endif
}

__device__ inline void copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most `kPending` of the thread's latest groups are in flight.
template <int kPending>
__device__ inline void copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

}  // namespace tango
