// In the place of the operator, whose kernels are not emulated: every call fails.
#include "common/check.h"
#include "tango/prune.h"

extern "C" void tango_prune_defaults(int32_t, int32_t, TangoPruneParams* params) { *params = {}; }

extern "C" int tango_prune_workspace(const TangoPruneShape*, const TangoPruneParams*, size_t*) {
    return tango::fail(TANGO_BAD_ARGUMENT, "the operator is not emulated");
}

extern "C" int tango_prune_enqueue(const TangoPruneShape*, const TangoPruneParams*, const TangoPruneTensors*, void*,
                                   size_t, void*) {
    return tango::fail(TANGO_BAD_ARGUMENT, "the operator is not emulated");
}
