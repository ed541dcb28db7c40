// Steps 1 and 2: cosines between frames, and ST-RoPE. (Sinks are set to 0 where salience is read.)
#include <algorithm>

#include "primitives.cuh"

namespace tango {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxFrames = 8;              // of a block of rotate_rows()
constexpr size_t kSharedBytes = 64 << 10;  // of such a block; every architecture has this much
constexpr float kEpsilon = 1e-12f;         // smallest norm that a row is divided by

// (cos, sin) of position * base^(-2 j / d), once per position. In fp64, because angles reach thousands.
__global__ void compute_rope(Job job) {
    const int time = job.time_pairs(), space = job.space_pairs();
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    const int in_time = job.F * time, in_space = (job.H() + job.W) * space;
    if (index < in_time) {
        const int j = index % time;
        const double angle = job.timestamps[index / time] * pow(job.time_base, -2.0 * j / (2 * time));
        job.rope_cos_sin[index] = make_float2(static_cast<float>(cos(angle)), static_cast<float>(sin(angle)));
    } else if (index < in_time + in_space) {
        const int row = (index - in_time) / space, j = (index - in_time) % space;
        const double angle = (row < job.H() ? row : row - job.H()) * pow(job.space_base, -2.0 * j / (2 * space));
        job.rope_cos_sin[index] = make_float2(static_cast<float>(cos(angle)), static_cast<float>(sin(angle)));
    }
}

// Copies a vector of a row from global to shared memory, asynchronously if it has 16 bytes.
template <typename T, int kVector>
__device__ void copy_row_part(T* to, const T* from, Vector<T, kVector>) {
    if constexpr (sizeof(T) * kVector == 16)
        copy_async(shared_address(to), from);
    else
        *reinterpret_cast<Vector<T, kVector>*>(to) = *reinterpret_cast<const Vector<T, kVector>*>(from);
}

// Stores component j of a rotated row: its fp16 in place, the rounding error to the low plane.
template <typename T, bool kExact>
__device__ void store_rotated(const Job& job, T* row, size_t offset, int j, float value) {
    const __half high = __float2half_rn(value);
    *reinterpret_cast<__half*>(row + j) = high;
    if (kExact) job.rotated_low[offset + j] = __float2half_rn(value - __half2float(high));
}

// Block (l, g) handles position l of a few frames, one warp per frame. It also loads the frame after them, for the
// cosine. Rows are rotated in shared memory in place: its fp16 replaces a component. The rounding error goes directly
// to global memory.
template <typename T, int kVector, bool kExact>
__global__ void rotate_rows(Job job) {
    using Load = Vector<T, kVector>;
    extern __shared__ __align__(16) unsigned char shared[];
    T* rows = reinterpret_cast<T*>(shared);
    const int warps = blockDim.x / kWarp, l = blockIdx.x, first = blockIdx.y * warps, f = first + warp_id();
    const int loads = job.D / kVector, held = min(warps + 1, job.F - first);
    for (int r = 0; r < held; ++r) {
        const size_t token = static_cast<size_t>(first + r) * job.L + l;
        const T* from = static_cast<const T*>(job.features) + token * job.D;
#pragma unroll 2
        for (int i = threadIdx.x; i < loads; i += blockDim.x)
            copy_row_part(rows + r * job.padded_D + i * kVector, from + i * kVector, Load());
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();

    T* row = rows + warp_id() * job.padded_D;
    float scale = 0.0f;
    if (f < job.F) {
        using Pair = Vector<T, 2>;
        const bool last = f + 1 == job.F;
        const T* next = last ? row : row + job.padded_D;
        float own_square = 0.0f, next_square = 0.0f, product = 0.0f;
#pragma unroll 4
        for (int j = 2 * lane_id(); j < job.D; j += 2 * kWarp) {
            const Pair a = *reinterpret_cast<const Pair*>(row + j), b = *reinterpret_cast<const Pair*>(next + j);
#pragma unroll
            for (int v = 0; v < 2; ++v) {
                const float own = static_cast<float>(a.at[v]), other = static_cast<float>(b.at[v]);
                own_square += own * own;
                next_square += other * other;
                product += own * other;
            }
        }
        const float length = fmaxf(sqrtf(warp_sum(own_square)), kEpsilon);
        const float next_length = fmaxf(sqrtf(warp_sum(next_square)), kEpsilon);
        product = warp_sum(product);
        if (lane_id() == 0 && !last) job.cosines[f * job.L + l] = fminf(product / length / next_length, 1.0f);
        scale = kRotatedScale / length;
    }
    __syncthreads();  // the warp of the frame before has read this row
    if (f >= job.F) return;

    const size_t offset = (static_cast<size_t>(f) * job.L + l) * job.padded_D;
    auto rotate_pairs = [&](const float2* angles, int start, int half) {  // components j and j + half of a section
#pragma unroll 4
        for (int pair = lane_id(); pair < half; pair += kWarp) {
            const float2 angle = __ldg(angles + pair);
            const int j = start + pair;
            const float a = scale * static_cast<float>(row[j]), b = scale * static_cast<float>(row[j + half]);
            store_rotated<T, kExact>(job, row, offset, j, a * angle.x - b * angle.y);
            store_rotated<T, kExact>(job, row, offset, j + half, b * angle.x + a * angle.y);
        }
    };
    const int in_time = job.time_pairs(), in_space = job.space_pairs();
    const float2* space = job.rope_cos_sin + job.F * in_time;
    rotate_pairs(job.rope_cos_sin + f * in_time, 0, in_time);
    rotate_pairs(space + l / job.W * in_space, 2 * in_time, in_space);
    rotate_pairs(space + (job.H() + l % job.W) * in_space, 2 * in_time + 2 * in_space, in_space);
    for (int j = job.D + lane_id(); j < job.padded_D; j += kWarp) store_rotated<T, kExact>(job, row, offset, j, 0.0f);
    __syncwarp();
    for (int j = 8 * lane_id(); j < job.padded_D; j += 8 * kWarp) {
        Vector<__half, 8> high;
        if constexpr (sizeof(T) == sizeof(__half)) {
            high = *reinterpret_cast<const Vector<__half, 8>*>(row + j);
        } else {
#pragma unroll
            for (int v = 0; v < 8; ++v) high.at[v] = *reinterpret_cast<const __half*>(row + j + v);
        }
        *reinterpret_cast<Vector<__half, 8>*>(job.rotated_high + offset + j) = high;
    }
}

template <typename T, int kVector, bool kExact>
cudaError_t launch_rows(const Job& job, cudaStream_t stream) {
    // The widest row leaves room for one frame and the next.
    const size_t row_bytes = static_cast<size_t>(job.padded_D) * sizeof(T);
    const int warps = std::max<int>(1, std::min<size_t>(kMaxFrames, kSharedBytes / row_bytes - 1));
    const size_t bytes = (warps + 1) * row_bytes;
    const auto kernel = rotate_rows<T, kVector, kExact>;
    const cudaError_t raised =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (raised != cudaSuccess) return raised;
    kernel<<<dim3(job.L, ceil_div(job.F, warps)), warps * kWarp, bytes, stream>>>(job);
    return cudaGetLastError();
}

template <typename T, int kVector>
cudaError_t launch_rows(const Job& job, cudaStream_t stream) {
    return job.exact_products ? launch_rows<T, kVector, true>(job, stream)
                              : launch_rows<T, kVector, false>(job, stream);
}

}  // namespace

cudaError_t rotate(const Job& job, cudaStream_t stream) {
    const int angles = job.F * job.time_pairs() + (job.H() + job.W) * job.space_pairs();
    compute_rope<<<ceil_div(angles, kThreads), kThreads, 0, stream>>>(job);
    if (job.half_features)
        return job.D % 8 == 0 ? launch_rows<__half, 8>(job, stream) : launch_rows<__half, 2>(job, stream);
    return job.D % 4 == 0 ? launch_rows<float, 4>(job, stream) : launch_rows<float, 2>(job, stream);
}

}  // namespace tango
