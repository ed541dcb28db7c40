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

Event::~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
}

int Event::record(cudaStream_t stream) {
    cudaError_t error = cudaEventCreateWithFlags(&event_, cudaEventDisableTiming);
    if (error == cudaSuccess) error = cudaEventRecord(event_, stream);
    return cuda_status(error, "record an event");
}

int Event::wait() const { return cuda_status(cudaEventSynchronize(event_), "wait for a stream"); }

bool Event::is_done() const {
    const bool is_done = cudaEventQuery(event_) == cudaSuccess;
    if (!is_done) cudaGetLastError();  // or the next call would report that it is not
    return is_done;
}

}  // namespace tango
