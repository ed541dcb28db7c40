// What describes the library itself: versions, and the sizes of its structs.
#include <cstring>

#include "tango/argmax.h"
#include "tango/attention.h"
#include "tango/common.h"
#include "tango/decode.h"
#include "tango/fp8.h"
#include "tango/frames.h"
#include "tango/linear.h"
#include "tango/norm.h"
#include "tango/patch_rotation.h"
#include "tango/patches.h"
#include "tango/prune.h"
#include "tango/thin.h"
#include "tango/vision_attention.h"

#ifndef TANGO_VERSION
#define TANGO_VERSION "unknown"
#endif
#ifndef TANGO_ARCHITECTURES
#define TANGO_ARCHITECTURES ""
#endif

int tango_abi_version(void) { return TANGO_ABI_VERSION; }

const char* tango_version(void) { return TANGO_VERSION " " TANGO_ARCHITECTURES; }

#define TANGO_SIZE(type) {#type, sizeof(type)}

size_t tango_sizeof(const char* name) {
    static const struct {
        const char* name;
        size_t bytes;
    } sizes[] = {
        TANGO_SIZE(TangoArgmax),
        TANGO_SIZE(TangoAttentionShape),
        TANGO_SIZE(TangoAttentionTensors),
        TANGO_SIZE(TangoDecodeCache),
        TANGO_SIZE(TangoDecodeLayer),
        TANGO_SIZE(TangoDecodeSequence),
        TANGO_SIZE(TangoDecodeShape),
        TANGO_SIZE(TangoDecodeTensors),
        TANGO_SIZE(TangoDecodeWords),
        TANGO_SIZE(TangoFp16LinearTensors),
        TANGO_SIZE(TangoFp8LinearTensors),
        TANGO_SIZE(TangoLinearShape),
        TANGO_SIZE(TangoMatrix),
        TANGO_SIZE(TangoNormShape),
        TANGO_SIZE(TangoNormTensors),
        TANGO_SIZE(TangoPatchRotationShape),
        TANGO_SIZE(TangoPatchRotationTensors),
        TANGO_SIZE(TangoPatchesShape),
        TANGO_SIZE(TangoPatchesTensors),
        TANGO_SIZE(TangoPruneParams),
        TANGO_SIZE(TangoPruneShape),
        TANGO_SIZE(TangoPruneTensors),
        TANGO_SIZE(TangoResizeShape),
        TANGO_SIZE(TangoResizeTensors),
        TANGO_SIZE(TangoThinShape),
        TANGO_SIZE(TangoThinTensors),
        TANGO_SIZE(TangoVisionAttentionShape),
        TANGO_SIZE(TangoVisionAttentionTensors),
    };
    for (const auto& size : sizes)
        if (name != nullptr && std::strcmp(size.name, name) == 0) return size.bytes;
    return 0;
}
