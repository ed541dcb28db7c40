#include "linear/matrix.h"

#include "common/check.h"

namespace tango {

int check_matrix(const char* name, const TangoMatrix& matrix) {
    if (int status = check_pointer(name, matrix.values, 16)) return status;
    if (int status = check_ranges({{"weights", matrix.weights, TANGO_WEIGHTS_FP16, TANGO_WEIGHTS_FP8},
                                   {"interleaved", matrix.interleaved, 0, 1}}))
        return status;
    if (matrix.weights == TANGO_WEIGHTS_FP16) return TANGO_OK;
    if (int status = check_pointer("scales", matrix.scales, matrix.weights == TANGO_WEIGHTS_INT8 ? 4 : 2))
        return status;
    if (matrix.weights == TANGO_WEIGHTS_INT8 || matrix.weights == TANGO_WEIGHTS_FP8) return TANGO_OK;
    if (matrix.group == 32 || matrix.group == 64 || matrix.group == 128) return TANGO_OK;
    return fail(TANGO_BAD_ARGUMENT, "group is %d: it must be 32, 64 or 128", matrix.group);
}

}  // namespace tango
