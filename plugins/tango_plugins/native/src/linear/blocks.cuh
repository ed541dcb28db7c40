// Where the weights and scales of a matrix of blocks are.
#pragma once

#include "common/platform.cuh"
#include "tango/linear.h"

namespace tango {

constexpr int kTileOutputs = 16, kPieceBytes = 64;  // of what is interleaved

// Outputs [output, piece], or, of every 16 outputs, [piece, output].
struct BlockPlaces {
    int blocks, row_bytes;  // of an output
    bool interleaved;

    // The byte that a byte of an output's weights is at.
    __device__ size_t value(int output, int byte) const {
        if (!interleaved) return static_cast<size_t>(output) * row_bytes + byte;
        return static_cast<size_t>(output / kTileOutputs) * kTileOutputs * row_bytes +
               (byte / kPieceBytes * kTileOutputs + output % kTileOutputs) * kPieceBytes + byte % kPieceBytes;
    }

    __device__ size_t scale(int output, int block) const {
        if (!interleaved) return static_cast<size_t>(output) * blocks + block;
        return (static_cast<size_t>(output / kTileOutputs) * blocks + block) * kTileOutputs + output % kTileOutputs;
    }
};

__host__ __device__ inline BlockPlaces places_of(const TangoMatrix& matrix, int inputs, int outputs) {
    const int blocks = (inputs + matrix.group - 1) >> (5 + (matrix.group >> 6));  // groups are 32, 64 or 128
    const int row_bytes = blocks * matrix.group / (matrix.weights == TANGO_WEIGHTS_BLOCKS_4 ? 2 : 1);
    const bool fits = outputs % kTileOutputs == 0 && row_bytes % kPieceBytes == 0;
    return {blocks, row_bytes, fits && matrix.interleaved != 0};
}

}  // namespace tango
