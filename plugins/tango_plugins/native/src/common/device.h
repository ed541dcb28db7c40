// What the host needs of the CUDA runtime: errors as a status, and the properties of the current device.
#pragma once

#include <cuda_runtime_api.h>

namespace tango {

// TANGO_OK, or TANGO_CUDA_ERROR with a sentence that says what was being done.
int cuda_status(cudaError_t error, const char* doing);

struct DeviceProperties {
    int sms = 0;
    int shared_bytes = 0;      // largest dynamic shared memory of a block
    int major = 0, minor = 0;  // of the compute capability
};

cudaError_t query_device(DeviceProperties& found);

// The work that a stream has at a moment.
class Event {
  public:
    Event() = default;
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    ~Event();

    // Takes the moment; both return a TangoStatus.
    int record(cudaStream_t stream);
    int wait() const;

    // Whether the work is known to be done.
    bool is_done() const;

  private:
    cudaEvent_t event_ = nullptr;
};

}  // namespace tango
