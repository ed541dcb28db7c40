// The product of many rows with a matrix of integers in two steps (tango/linear.h): a slab of the matrix, all inputs of
// some outputs, becomes fp16 in a workspace, cuBLASLt multiplies by it, and so on with the next slab.
#include "linear/slabs.h"

#include <algorithm>

#include "common/check.h"
#include "common/device.h"
#include "linear/product.h"

namespace tango {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kVector = 8;                // weights that a lane takes at a time: 16 bytes of fp16
constexpr int kVectors = 4;               // of a lane, loaded together
constexpr int kChunk = kVectors * kWarp;  // vectors of a warp
constexpr int kNarrowest = 128;           // outputs of a slab; others are multiples of it
constexpr size_t kItem = sizeof(uint16_t);

// The wider the faster: with 659 rows, a gate of the 7B takes 169 us on an H200 in one slab, 187 to 196 in four. It has
// 135.8 MB, as has its down projection, and so only its head is cut.
constexpr size_t kSlabBytes = 136'000'000;

// The argument of the kernel. A line is the inputs of an output or, of weights by rows, the outputs of an input.
struct SlabJob {
    LinearJob linear;
    uint4* slab;
    int begin, outputs;  // of the slab
    int lines, vectors;  // vectors of a line
    int chunks;          // of a line
};

template <int kBits>
struct BlockLines {
    struct Packed {
        typename PackedInts<kBits>::Eight values;
        Scaling scaling;
    };

    __device__ static Packed load(const SlabJob& job, int line, int vector) {
        constexpr int kOfUnit = kUnit / kVector;
        using Eight = decltype(Packed::values);
        const size_t at = job.linear.places.value(job.begin + line, vector * static_cast<int>(sizeof(Eight)));
        return {*reinterpret_cast<const Eight*>(static_cast<const char*>(job.linear.matrix.values) + at),
                Blocks<kBits>::scaling(job.linear, 0, job.begin + line, vector / kOfUnit)};
    }

    __device__ static uint4 unpack(const Packed& from) {
        const auto pair = [&](int t) {
            return mul2(unpack_pair(from.values, t, from.scaling.zero), from.scaling.scale);
        };
        return {pair(0), pair(1), pair(2), pair(3)};
    }
};

struct RowLines {
    struct Packed {
        uint2 values;
        float4 scales[2];
    };

    __device__ static Packed load(const SlabJob& job, int line, int vector) {
        const int first = vector * kVector, stride = job.linear.shape.outputs;
        const auto* const values = static_cast<const int8_t*>(job.linear.matrix.values) +
                                   static_cast<size_t>(line) * stride + job.begin + first;
        const auto* const scales = static_cast<const float*>(job.linear.matrix.scales) + job.begin + first;
        if (stride % kVector == 0 && reinterpret_cast<uintptr_t>(scales) % sizeof(float4) == 0) {
            const auto* const four = reinterpret_cast<const float4*>(scales);
            return {*reinterpret_cast<const uint2*>(values), {four[0], four[1]}};
        }
        const auto value = [&](int i) { return first + i < job.outputs ? static_cast<uint8_t>(values[i]) : 0u; };
        const auto scale = [&](int i) { return first + i < job.outputs ? scales[i] : 0.0f; };
        return {{value(0) | value(1) << 8 | value(2) << 16 | value(3) << 24,
                 value(4) | value(5) << 8 | value(6) << 16 | value(7) << 24},
                {{scale(0), scale(1), scale(2), scale(3)}, {scale(4), scale(5), scale(6), scale(7)}}};
    }

    __device__ static uint4 unpack(const Packed& from) {
        const auto pair = [](uint32_t word, int i, float even, float odd) {
            const auto value = [&](int at) { return static_cast<float>(static_cast<int8_t>(word >> 8 * at)); };
            return bits_of(__floats2half2_rn(value(i) * even, value(i + 1) * odd));
        };
        const float4 low = from.scales[0], high = from.scales[1];
        return {pair(from.values.x, 0, low.x, low.y), pair(from.values.x, 2, low.z, low.w),
                pair(from.values.y, 0, high.x, high.y), pair(from.values.y, 2, high.z, high.w)};
    }
};

template <typename Lines>
__global__ void __launch_bounds__(kThreads) dequantize(const SlabJob job) {
    const int chunk = blockIdx.x * kWarps + warp_id();
    const int line = chunk / job.chunks, first = chunk % job.chunks * kChunk + lane_id();
    if (line >= job.lines) return;
    uint4* const to = job.slab + static_cast<size_t>(line) * job.vectors;
    typename Lines::Packed packed[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) packed[i] = Lines::load(job, line, min(first + i * kWarp, job.vectors - 1));
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
        if (first + i * kWarp < job.vectors) to[first + i * kWarp] = Lines::unpack(packed[i]);
}

cudaError_t fill(SlabJob& job, cudaStream_t stream) {
    const int weights = job.linear.matrix.weights;
    const bool by_rows = weights == TANGO_WEIGHTS_INT8;
    job.lines = by_rows ? job.linear.shape.inputs : job.outputs;
    job.vectors = ceil_div(by_rows ? job.outputs : job.linear.shape.inputs, kVector);
    job.chunks = ceil_div(job.vectors, kChunk);
    const auto kernel = by_rows                             ? dequantize<RowLines>
                        : weights == TANGO_WEIGHTS_BLOCKS_4 ? dequantize<BlockLines<4>>
                                                            : dequantize<BlockLines<8>>;
    return launch(kernel, job, ceil_div(job.lines * job.chunks, kWarps), kThreads, 0, stream);
}

size_t bytes_of(const TangoLinearShape& shape, int outputs) {
    return kItem * kVector * kVector * ceil_div(shape.inputs, kVector) * ceil_div(outputs, kVector);
}

// Outputs that there is room for, at least kNarrowest.
int room_of(const TangoLinearShape& shape, size_t bytes) {
    const size_t room = bytes / bytes_of(shape, 1) * kVector;
    return static_cast<int>(std::clamp<size_t>(room, kNarrowest, std::max(shape.outputs, kNarrowest)));
}

// Outputs of a slab where there is room for so many: slabs of about the same size.
int divide(int outputs, int room) {
    if (room >= outputs) return outputs;
    const int slabs = ceil_div(outputs, room / kNarrowest * kNarrowest);
    return ceil_div(ceil_div(outputs, slabs), kNarrowest) * kNarrowest;
}

}  // namespace

size_t slab_bytes(const TangoLinearShape& shape, int major) {
    if (shape.rows == 0 || major != 9) return 0;
    return bytes_of(shape, divide(shape.outputs, room_of(shape, kSlabBytes)));
}

int multiply_slabs(const LinearJob& linear, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
    const TangoLinearShape& shape = linear.shape;
    const size_t needed = bytes_of(shape, std::min(shape.outputs, kNarrowest));
    if (workspace_bytes < needed)
        return fail(TANGO_SMALL_WORKSPACE, "workspace has %zu bytes: it must have %zu", workspace_bytes, needed);
    const int widest = divide(shape.outputs, room_of(shape, workspace_bytes));
    for (int begin = 0; begin < shape.outputs; begin += widest) {
        SlabJob job = {linear, static_cast<uint4*>(workspace), begin, std::min(widest, shape.outputs - begin), 0, 0, 0};
        if (int status = cuda_status(fill(job, stream), "linear")) return status;
        Product product = {"linear", {shape.rows, shape.inputs, job.outputs}, linear.x, workspace, linear.y + begin};
        product.by_outputs = linear.matrix.weights != TANGO_WEIGHTS_INT8;
        product.weight_pitch = job.vectors * kVector;
        product.y_pitch = shape.outputs;
        if (int status = multiply(product, stream)) return status;
    }
    return TANGO_OK;
}

}  // namespace tango
