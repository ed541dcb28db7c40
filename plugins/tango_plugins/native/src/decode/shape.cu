#include "shape.h"

#include "common/check.h"
#include "linear/matrix.h"

namespace tango {
namespace {

int check_shape(const TangoDecodeShape* shape) {
    if (int status = check_pointer("shape", shape, 1)) return status;
    if (int status = check_ranges({
            {"layers", shape->layers, 1, 1024},
            {"hidden_size", shape->hidden_size, 16, 16384},
            {"heads", shape->heads, 1, 1024},
            {"kv_heads", shape->kv_heads, 1, shape->heads},
            {"head_dim", shape->head_dim, 16, 256},
            {"intermediate", shape->intermediate, 16, 65536},
            {"head_columns", shape->head_columns, 16, 1 << 24},
            {"vocabulary", shape->vocabulary, 1, shape->head_columns},
            {"capacity", shape->capacity, 1, kMaxCapacity},
            {"formats", shape->formats, TANGO_DECODE_FP16, TANGO_DECODE_BLOCKS_4},
        }))
        return status;
    const struct {
        const char* name;
        int value;
    } dims[] = {{"hidden_size", shape->hidden_size},
                {"head_dim", shape->head_dim},
                {"intermediate", shape->intermediate},
                {"head_columns", shape->head_columns}};
    for (const auto& dim : dims)
        if (int status = check_multiple(dim.name, dim.value, kDimMultiple)) return status;
    if (shape->heads % shape->kv_heads != 0)
        return fail(TANGO_BAD_ARGUMENT, "heads is %d: it must be a multiple of kv_heads, %d", shape->heads,
                    shape->kv_heads);
    const int group_width = shape->heads / shape->kv_heads * shape->head_dim;
    if (group_width > kMaxGroupWidth)
        return fail(TANGO_BAD_ARGUMENT, "heads / kv_heads * head_dim is %d: it must be at most %d", group_width,
                    kMaxGroupWidth);
    return TANGO_OK;
}

}  // namespace

int take_shape(const TangoDecodeShape* given, TangoDecodeShape& shape, DeviceProperties& gpu) {
    if (int status = check_shape(given)) return status;
    if (int status = cuda_status(query_device(gpu), "decode")) return status;
    if (int status = check_ranges({{"blocks", given->blocks, 0, gpu.sms}})) return status;
    shape = *given;
    if (shape.blocks == 0) shape.blocks = gpu.sms;
    return TANGO_OK;
}

int check_weights(const TangoDecodeShape& shape, const TangoDecodeTensors* tensors) {
    int status = check_pointer("tensors", tensors, 1);
    if (status == TANGO_OK) status = check_pointer("layers", tensors->layers, 16);
    if (status == TANGO_OK) status = check_pointer("frequencies", tensors->frequencies, 4);
    if (status == TANGO_OK) status = check_pointer("norm", tensors->norm, 16);
    if (status == TANGO_OK) status = check_matrix("head", tensors->head);
    if (status != TANGO_OK || shape.formats == TANGO_DECODE_MIXED) return status;
    const int only = shape.formats == TANGO_DECODE_FP16 ? TANGO_WEIGHTS_FP16 : TANGO_WEIGHTS_BLOCKS_4;
    if (tensors->head.weights != only)
        return fail(TANGO_BAD_ARGUMENT, "head has weights of format %d, but formats is %d", tensors->head.weights,
                    shape.formats);
    return TANGO_OK;
}

}  // namespace tango
