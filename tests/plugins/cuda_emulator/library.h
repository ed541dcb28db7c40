// What every one of these libraries has: an interface that Python loads, and a GPU.
#pragma once

#include "check.cpp"

extern "C" {

int tango_prune_interface() { return TANGO_PRUNE_INTERFACE; }
const char* tango_version() { return ""; }
int tango_prune_enqueue_steps() { return TANGO_CUDA_ERROR; }

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return ""; }
const char* cudaGetErrorString(cudaError_t) { return ""; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? kMultiprocessors : kSharedBytes;
    return cudaSuccess;
}
}
