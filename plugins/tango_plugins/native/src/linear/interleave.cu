// Interleaves a matrix of blocks (tango/linear.h): copies some tiles of 16 outputs aside, and back in another order.
#include <algorithm>

#include "common/check.h"
#include "common/device.h"
#include "linear/blocks.cuh"
#include "linear/matrix.h"

namespace tango {
namespace {

constexpr int kThreads = 256;

// A piece of an output's values.
struct Piece {
    uint4 vectors[kPieceBytes / sizeof(uint4)];
};

// Tiles [kTileOutputs, pieces] become [pieces, kTileOutputs].
template <typename Element>
struct TransposeJob {
    const Element* from;
    Element* to;
    int pieces, count;  // of an output, and of all tiles
};

template <typename Element>
__global__ void __launch_bounds__(kThreads) transpose(const TransposeJob<Element> job) {
    const int at = blockIdx.x * kThreads + threadIdx.x;
    if (at >= job.count) return;
    const int piece = at / kTileOutputs % job.pieces, tile = at / kTileOutputs / job.pieces;
    job.to[at] = job.from[(tile * kTileOutputs + at % kTileOutputs) * job.pieces + piece];
}

template <typename Element>
cudaError_t interleave(void* matrix, int tiles, int pieces, void* workspace, size_t workspace_bytes,
                       cudaStream_t stream) {
    const int of_tile = kTileOutputs * pieces;
    const int at_once = std::min<size_t>(tiles, workspace_bytes / (of_tile * sizeof(Element)));
    for (int begin = 0; begin < tiles; begin += at_once) {
        Element* const to = static_cast<Element*>(matrix) + static_cast<size_t>(begin) * of_tile;
        const int count = std::min(at_once, tiles - begin) * of_tile;
        const size_t bytes = count * sizeof(Element);
        if (cudaError_t error = cudaMemcpyAsync(workspace, to, bytes, cudaMemcpyDeviceToDevice, stream)) return error;
        const TransposeJob<Element> job = {static_cast<const Element*>(workspace), to, pieces, count};
        if (cudaError_t error = launch(transpose<Element>, job, ceil_div(count, kThreads), kThreads, 0, stream))
            return error;
    }
    return cudaSuccess;
}

}  // namespace
}  // namespace tango

using namespace tango;

int tango_interleave_enqueue(const TangoMatrix* matrix, int32_t inputs, int32_t outputs, void* workspace,
                             size_t workspace_bytes, void* stream) {
    if (int status = check_pointer("matrix", matrix, 1)) return status;
    if (int status = check_ranges({{"inputs", inputs, 1, 1 << 20}, {"outputs", outputs, 1, 1 << 20}})) return status;
    if (int status = check_matrix("values", *matrix)) return status;
    if (int status = check_ranges({{"weights", matrix->weights, TANGO_WEIGHTS_BLOCKS_4, TANGO_WEIGHTS_BLOCKS_8},
                                   {"interleaved", matrix->interleaved, 0, 0}}))
        return status;
    if (int status = check_pointer("workspace", workspace, 16)) return status;
    TangoMatrix wanted = *matrix;
    wanted.interleaved = 1;
    const BlockPlaces places = places_of(wanted, inputs, outputs);
    if (!places.interleaved) return TANGO_OK;
    const size_t needed = static_cast<size_t>(kTileOutputs) * places.row_bytes;
    if (workspace_bytes < needed)
        return fail(TANGO_SMALL_WORKSPACE, "workspace has %zu bytes: it must have %zu", workspace_bytes, needed);
    const int tiles = outputs / kTileOutputs;
    const auto on = static_cast<cudaStream_t>(stream);
    const auto enqueue = [&](auto element, const void* all, int pieces) {
        return interleave<decltype(element)>(const_cast<void*>(all), tiles, pieces, workspace, workspace_bytes, on);
    };
    cudaError_t error = enqueue(Piece(), matrix->values, places.row_bytes / kPieceBytes);
    if (error == cudaSuccess) error = enqueue(uint16_t(), matrix->scales, places.blocks);
    return cuda_status(error, "interleave");
}
