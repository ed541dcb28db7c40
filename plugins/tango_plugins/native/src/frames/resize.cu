// Color conversion, rotation and bicubic resize of frames (tango/frames.h). One kernel finds the filter's weights,
// the others resize in one dimension each, rounding to uint8 in between as Pillow does. Reading the frames bounds
// them: 6 MB of a 1920×1080 frame against 0.4 MB of a result of 384×384.
#include <climits>
#include <cmath>

#include "common/check.h"
#include "common/device.h"
#include "common/platform.cuh"
#include "tango/frames.h"

namespace tango {
namespace {

constexpr int kThreads = 256, kMaxBlocks = 1 << 20;
constexpr int kMaxFrames = 1 << 16, kMaxSide = 1 << 16;
constexpr size_t kAlignment = 256;

constexpr double kSupport = 2.0;  // of the bicubic filter, in source pixels where nothing is reduced
constexpr int kWeightBits = 22;   // of a weight's fraction: 32 less 8 of a pixel and 2 for sums beyond [0, 1]

// One dimension of the resize. Weights are of shape [taps, to]: neighboring threads read neighboring ones.
struct Axis {
    int from, to, taps;
    int *first, *count, *weights;
};

// What a pixel of luma l and chroma (u, v), each 8 times its 8-bit value, contributes to RGB: products of 16-bit
// factors, of which the upper halves are added.
struct Colors {
    int luma_zero, luma, red_v, green_u, green_v, blue_u;
};

struct Job {
    const uint8_t *image, *chroma;
    int64_t pitch, frame_bytes;
    bool transpose, flip_rows, flip_columns, columns_first;
    Colors colors;
    Axis x, y;
    uint8_t *between, *resized;  // [frames, between_rows, between_columns, 3], [frames, y.to, x.to, 3]
    int between_rows, between_columns;
    int64_t between_pixels, resized_bytes;
};

// Keys' cubic. A product that is fused with a sum rounds otherwise, and a weight might be another than Pillow's.
__device__ inline double bicubic(double x) {
    constexpr double a = -0.5;
    x = x < 0.0 ? -x : x;
    if (x < 1.0) return __dadd_rn(__dmul_rn(__dmul_rn(__dadd_rn(__dmul_rn(a + 2.0, x), -(a + 3.0)), x), x), 1.0);
    if (x < 2.0) return __dmul_rn(__dadd_rn(__dmul_rn(__dadd_rn(__dmul_rn(__dadd_rn(x, -5.0), x), 8.0), x), -4.0), a);
    return 0.0;
}

__device__ inline void find_weights_of(const Axis& axis, int i) {
    const double scale = static_cast<double>(axis.from) / axis.to, stretch = scale < 1.0 ? 1.0 : scale;
    const double support = kSupport * stretch, squeeze = 1.0 / stretch, center = __dmul_rn(i + 0.5, scale);
    const int first = max(static_cast<int>(center - support + 0.5), 0);
    const int count = min(static_cast<int>(center + support + 0.5), axis.from) - first;
    double sum = 0.0;
    for (int tap = 0; tap < count; ++tap) sum += bicubic(__dmul_rn(tap + first - center + 0.5, squeeze));
    for (int tap = 0; tap < count; ++tap) {
        const double weight = bicubic(__dmul_rn(tap + first - center + 0.5, squeeze)) / sum * (1 << kWeightBits);
        axis.weights[tap * axis.to + i] = static_cast<int>(weight + (weight < 0.0 ? -0.5 : 0.5));
    }
    axis.first[i] = first;
    axis.count[i] = count;
}

__global__ void __launch_bounds__(kThreads) find_weights(Job job) {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (i < job.x.to)
        find_weights_of(job.x, i);
    else if (i < job.x.to + job.y.to)
        find_weights_of(job.y, i - job.x.to);
}

__device__ inline int clip(int value) { return min(max(value, 0), 255); }

// A weighted sum with half a unit added, as a pixel.
__device__ inline int rounded(int sum) { return clip(sum >> kWeightBits); }

struct Pixel {
    int red, green, blue;
};

template <int kFormat>
__device__ inline Pixel read_pixel(const Job& job, int64_t frame, int y, int x) {
    const int64_t begin = frame * job.frame_bytes;
    if constexpr (kFormat == TANGO_RGB24) {
        const uint8_t* at = job.image + begin + y * job.pitch + 3 * x;
        return {at[0], at[1], at[2]};
    } else {
        const int64_t luma_at = begin + y * job.pitch, chroma_at = begin + y / 2 * job.pitch;
        int luma, u, v;
        if constexpr (kFormat == TANGO_NV12) {
            luma = job.image[luma_at + x] << 3;
            u = job.chroma[chroma_at + x / 2 * 2] << 3;
            v = job.chroma[chroma_at + x / 2 * 2 + 1] << 3;
        } else {
            const auto* pair = reinterpret_cast<const uint16_t*>(job.chroma + chroma_at) + x / 2 * 2;
            luma = reinterpret_cast<const uint16_t*>(job.image + luma_at)[x] >> 6 << 1;
            u = pair[0] >> 6 << 1;
            v = pair[1] >> 6 << 1;
        }
        const Colors& c = job.colors;
        luma = (luma - c.luma_zero) * c.luma >> 16;
        u -= 128 << 3;
        v -= 128 << 3;
        return {clip(luma + (v * c.red_v >> 16)), clip(luma + (u * c.green_u >> 16) + (v * c.green_v >> 16)),
                clip(luma + (u * c.blue_u >> 16))};
    }
}

// The first pass, from the frames. A thread makes a pixel.
template <int kFormat>
__global__ void __launch_bounds__(kThreads) resize_frames(Job job) {
    const Axis& axis = job.columns_first ? job.y : job.x;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < job.between_pixels; i += stride) {
        const int64_t row = i / job.between_columns, frame = row / job.between_rows;
        const int x = i % job.between_columns, y = row % job.between_rows, to = job.columns_first ? y : x;
        int red = 1 << (kWeightBits - 1), green = red, blue = red;
        const int first = axis.first[to], count = axis.count[to];
        for (int tap = 0; tap < count; ++tap) {
            int shown_y = job.columns_first ? first + tap : y, shown_x = job.columns_first ? x : first + tap;
            if (job.flip_rows) shown_y = job.y.from - 1 - shown_y;
            if (job.flip_columns) shown_x = job.x.from - 1 - shown_x;
            const Pixel pixel = job.transpose ? read_pixel<kFormat>(job, frame, shown_x, shown_y)
                                              : read_pixel<kFormat>(job, frame, shown_y, shown_x);
            const int weight = axis.weights[tap * axis.to + to];
            red += weight * pixel.red;
            green += weight * pixel.green;
            blue += weight * pixel.blue;
        }
        uint8_t* at = job.between + 3 * i;
        at[0] = rounded(red);
        at[1] = rounded(green);
        at[2] = rounded(blue);
    }
}

// The second pass. A thread makes a channel of a pixel.
__global__ void __launch_bounds__(kThreads) resize_again(Job job) {
    const Axis& axis = job.columns_first ? job.x : job.y;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    const int row_bytes = 3 * job.between_columns, step = job.columns_first ? 3 : row_bytes;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < job.resized_bytes; i += stride) {
        const int64_t row = i / (3 * job.x.to), frame = row / job.y.to;
        const int along = i % (3 * job.x.to), y = row % job.y.to, to = job.columns_first ? along / 3 : y;
        const int first = axis.first[to], count = axis.count[to];
        const int from_y = job.columns_first ? y : first, from_x = job.columns_first ? 3 * first + along % 3 : along;
        const uint8_t* from = job.between + (frame * job.between_rows + from_y) * row_bytes + from_x;
        int sum = 1 << (kWeightBits - 1);
        for (int tap = 0; tap < count; ++tap)
            sum += axis.weights[tap * axis.to + to] * from[static_cast<int64_t>(tap) * step];
        job.resized[i] = rounded(sum);
    }
}

int taps_of(int from, int to) {
    const double scale = static_cast<double>(from) / to;
    return static_cast<int>(std::ceil(kSupport * (scale < 1.0 ? 1.0 : scale))) * 2 + 1;
}

// Sets the pointers into a workspace; returns its size.
size_t lay_out(Job& job, char* workspace) {
    size_t used = 0;
    const auto place = [&](auto& pointer, size_t bytes) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(workspace + used);
        used += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    };
    for (Axis* axis : {&job.x, &job.y}) {
        const size_t ints = axis->to * sizeof(int);
        place(axis->first, ints);
        place(axis->count, ints);
        place(axis->weights, axis->taps * ints);
    }
    place(job.between, 3 * job.between_pixels);
    return used;
}

// Shares of red and blue in luma, of a matrix of ITU-T H.273, table 4.
void luma_shares(int matrix, double& red, double& blue) {
    switch (matrix) {
        case 1: red = 0.2126, blue = 0.0722; break;
        case 4: red = 0.30, blue = 0.11; break;
        case 7: red = 0.212, blue = 0.087; break;
        case 9: red = 0.2627, blue = 0.0593; break;
        default: red = 0.299, blue = 0.114; break;
    }
}

Colors colors_of(const TangoResizeShape& shape) {
    double red, blue;
    luma_shares(shape.matrix, red, blue);
    const double green = 1.0 - red - blue, scale = shape.full_range ? 1.0 : 255.0 / 224.0;
    const auto factor = [&](double value) { return static_cast<int>(std::lround(8192.0 * scale * value)); };
    Colors colors;
    colors.luma_zero = shape.full_range ? 0 : 16 << 3;
    colors.luma = static_cast<int>(std::lround(8192.0 * (shape.full_range ? 1.0 : 255.0 / 219.0)));
    colors.red_v = factor(2.0 * (1.0 - red));
    colors.green_u = -factor(2.0 * (1.0 - blue) * blue / green);
    colors.green_v = -factor(2.0 * (1.0 - red) * red / green);
    colors.blue_u = factor(2.0 * (1.0 - blue));
    return colors;
}

int check_shape(const TangoResizeShape* shape) {
    if (int status = check_pointer("shape", shape, alignof(TangoResizeShape))) return status;
    if (int status = check_ranges({{"frames", shape->frames, 0, kMaxFrames},
                                   {"format", shape->format, TANGO_RGB24, TANGO_P010},
                                   {"rows", shape->rows, 1, kMaxSide},
                                   {"columns", shape->columns, 1, kMaxSide},
                                   {"out_rows", shape->out_rows, 1, kMaxSide},
                                   {"out_columns", shape->out_columns, 1, kMaxSide},
                                   {"full_range", shape->full_range, 0, 1},
                                   {"transpose", shape->transpose, 0, 1},
                                   {"flip_rows", shape->flip_rows, 0, 1},
                                   {"flip_columns", shape->flip_columns, 0, 1},
                                   {"columns_first", shape->columns_first, 0, 1}}))
        return status;
    const bool rgb = shape->format == TANGO_RGB24;
    const int sample = shape->format == TANGO_P010 ? 2 : 1;
    const int row_bytes = rgb ? 3 * shape->columns : ceil_div(shape->columns, 2) * 2 * sample;
    if (int status =
            check_ranges({{"pitch", shape->pitch, row_bytes, INT_MAX},
                          {"frame_rows", shape->frames > 1 ? shape->frame_rows : shape->rows, shape->rows, INT_MAX}}))
        return status;
    if (shape->pitch % sample != 0) return fail(TANGO_BAD_ARGUMENT, "pitch is %d: it must be even", shape->pitch);
    if (!rgb && (shape->matrix == 3 || shape->matrix == 8))
        return fail(TANGO_BAD_ARGUMENT, "matrix is %d: it must be 1, 2, 4, 5, 6, 7 or 9", shape->matrix);
    return rgb ? TANGO_OK : check_ranges({{"matrix", shape->matrix, 1, 9}});
}

Job job_of(const TangoResizeShape& shape) {
    Job job{};
    job.pitch = shape.pitch;
    job.frame_bytes = static_cast<int64_t>(shape.frame_rows) * shape.pitch;
    job.transpose = shape.transpose, job.flip_rows = shape.flip_rows, job.flip_columns = shape.flip_columns;
    job.columns_first = shape.columns_first;
    const int rows = shape.transpose ? shape.columns : shape.rows;
    const int columns = shape.transpose ? shape.rows : shape.columns;
    job.x = {columns, shape.out_columns, taps_of(columns, shape.out_columns)};
    job.y = {rows, shape.out_rows, taps_of(rows, shape.out_rows)};
    job.between_rows = job.columns_first ? job.y.to : rows;
    job.between_columns = job.columns_first ? columns : job.x.to;
    job.between_pixels = static_cast<int64_t>(shape.frames) * job.between_rows * job.between_columns;
    job.resized_bytes = static_cast<int64_t>(shape.frames) * job.y.to * job.x.to * 3;
    job.colors = colors_of(shape);
    return job;
}

cudaError_t enqueue(const Job& job, int format, cudaStream_t stream) {
    const auto blocks = [](int64_t items) {
        return static_cast<int>(min((items + kThreads - 1) / kThreads, static_cast<int64_t>(kMaxBlocks)));
    };
    const auto first = format == TANGO_NV12   ? resize_frames<TANGO_NV12>
                       : format == TANGO_P010 ? resize_frames<TANGO_P010>
                                              : resize_frames<TANGO_RGB24>;
    cudaError_t error = launch(find_weights, job, ceil_div(job.x.to + job.y.to, kThreads), kThreads, 0, stream);
    if (error == cudaSuccess) error = launch(first, job, blocks(job.between_pixels), kThreads, 0, stream);
    if (error == cudaSuccess) error = launch(resize_again, job, blocks(job.resized_bytes), kThreads, 0, stream);
    return error;
}

}  // namespace
}  // namespace tango

int tango_resize_workspace(const TangoResizeShape* shape, size_t* bytes) {
    using namespace tango;
    if (int status = check_shape(shape)) return status;
    if (int status = check_pointer("bytes", bytes, alignof(size_t))) return status;
    Job job = job_of(*shape);
    *bytes = lay_out(job, nullptr);
    return TANGO_OK;
}

int tango_resize_enqueue(const TangoResizeShape* shape, const TangoResizeTensors* tensors, void* workspace,
                         size_t workspace_bytes, void* stream) {
    using namespace tango;
    if (int status = check_shape(shape)) return status;
    if (int status = check_pointer("tensors", tensors, alignof(TangoResizeTensors))) return status;
    if (shape->frames == 0) return TANGO_OK;
    const size_t sample = shape->format == TANGO_P010 ? 2 : 1;
    if (int status = check_pointer("image", tensors->image, sample)) return status;
    if (shape->format != TANGO_RGB24)
        if (int status = check_pointer("chroma", tensors->chroma, sample)) return status;
    if (int status = check_pointer("resized", tensors->resized, 1)) return status;
    if (int status = check_pointer("workspace", workspace, kAlignment)) return status;
    Job job = job_of(*shape);
    const size_t needed = lay_out(job, static_cast<char*>(workspace));
    if (workspace_bytes < needed)
        return fail(TANGO_SMALL_WORKSPACE, "workspace has %zu bytes: it must have %zu", workspace_bytes, needed);
    job.image = static_cast<const uint8_t*>(tensors->image);
    job.chroma = static_cast<const uint8_t*>(tensors->chroma);
    job.resized = static_cast<uint8_t*>(tensors->resized);
    return cuda_status(enqueue(job, shape->format, static_cast<cudaStream_t>(stream)), "resize");
}
