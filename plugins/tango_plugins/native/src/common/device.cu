#include "common/device.h"

#include "common/check.h"
#include "tango/common.h"

namespace tango {

int cuda_status(cudaError_t error, const char* doing) {
    if (error == cudaSuccess) return TANGO_OK;
    return fail(TANGO_CUDA_ERROR, "%s: %s (%s)", doing, cudaGetErrorString(error), cudaGetErrorName(error));
}

cudaError_t query_device(DeviceProperties& found) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&found.sms, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&found.major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&found.minor, cudaDevAttrComputeCapabilityMinor, device);
    return error;
}

}  // namespace tango
