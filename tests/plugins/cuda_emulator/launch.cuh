// src/launch.cuh on a CPU's threads: block after block, since none waits for another.
#pragma once

#include "gpu.cuh"

namespace tango {

template <typename Argument>
cudaError_t launch(void (*kernel)(Argument), Argument argument, int blocks, int threads, size_t shared, cudaStream_t) {
    for (int b = 0; b < blocks; ++b) {
        std::deque<Block> one;
        one.emplace_back(threads, shared);
        run(kernel, argument, one, threads, b, blocks);
    }
    return cudaSuccess;
}

}  // namespace tango
