// Launches kernels with as much shared memory as they ask for, which they find at shared_memory().
#pragma once

#include <cstdint>

namespace tango {

__device__ inline float4* shared_memory() {
    extern __shared__ float4 memory[];
    return memory;
}

constexpr size_t kSharedForAll = 48 << 10;  // more must be allowed

inline cudaError_t allow_shared(const void* function, size_t bytes) {
    if (bytes <= kSharedForAll) return cudaSuccess;
    return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <typename Argument>
cudaError_t launch(void (*kernel)(Argument), Argument argument, int blocks, int threads, size_t shared,
                   cudaStream_t stream) {
    const void* function = reinterpret_cast<const void*>(kernel);
    const cudaError_t error = allow_shared(function, shared);
    if (error != cudaSuccess) return error;
    void* arguments[] = {&argument};
    return cudaLaunchKernel(function, dim3(blocks), dim3(threads), arguments, shared, stream);
}

}  // namespace tango
