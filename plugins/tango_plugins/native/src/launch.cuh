// Launches a kernel with as much shared memory as it asks for, which it finds at shared_memory().
#pragma once

#include <cstdint>

namespace tango {

__device__ inline float4* shared_memory() {
    extern __shared__ float4 memory[];
    return memory;
}

template <typename Argument>
cudaError_t launch(void (*kernel)(Argument), Argument argument, int blocks, int threads, size_t shared,
                   cudaStream_t stream) {
    const void* function = reinterpret_cast<const void*>(kernel);
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
    void* arguments[] = {&argument};
    return cudaLaunchKernel(function, dim3(blocks), dim3(threads), arguments, shared, stream);
}

}  // namespace tango
