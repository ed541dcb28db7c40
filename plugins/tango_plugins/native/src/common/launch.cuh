// Launches kernels of one argument with dynamic shared memory, which they find at shared_memory().
#pragma once

#include <cstdint>

namespace tango {

__device__ inline float4* shared_memory() {
    extern __shared__ float4 memory[];
    return memory;
}

constexpr size_t kDefaultSharedBytes = 48 << 10;  // a kernel must opt in to more

inline cudaError_t allow_shared(const void* function, size_t bytes) {
    if (bytes <= kDefaultSharedBytes) return cudaSuccess;
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

// Launches a kernel whose blocks wait for each other: the launch fails unless all of them are resident at once.
template <typename Argument>
cudaError_t launch_cooperative(void (*kernel)(Argument), Argument argument, int blocks, int threads, size_t shared,
                               cudaStream_t stream) {
    const void* function = reinterpret_cast<const void*>(kernel);
    const cudaError_t error = allow_shared(function, shared);
    if (error != cudaSuccess) return error;
    void* arguments[] = {&argument};
    return cudaLaunchCooperativeKernel(function, dim3(blocks), dim3(threads), arguments, shared, stream);
}

}  // namespace tango
