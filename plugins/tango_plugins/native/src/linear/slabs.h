// Products with integers that become fp16 in a workspace, slab by slab.
#pragma once

#include "linear/weights.cuh"

namespace tango {

// Bytes of a workspace that suits the product on a GPU of this major compute capability; 0 where it gains nothing.
size_t slab_bytes(const TangoLinearShape& shape, int major);

// Enqueues the product; returns a TangoStatus. The job has been checked, the size of the workspace has not.
int multiply_slabs(const LinearJob& linear, void* workspace, size_t workspace_bytes, cudaStream_t stream);

}  // namespace tango
