// The functions of the CUDA runtime that the library's host code calls, for a GPU of the size that the build names.
#include <cuda_runtime_api.h>

#include <cstring>

extern "C" {

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

// Work is done when it is enqueued.
cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return ""; }
const char* cudaGetErrorString(cudaError_t) { return ""; }

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount            ? TANGO_EMULATED_SMS
             : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? TANGO_EMULATED_SHARED_BYTES
             : attribute == cudaDevAttrComputeCapabilityMajor       ? TANGO_EMULATED_MAJOR
                                                                    : TANGO_EMULATED_MINOR;
    return cudaSuccess;
}
}
