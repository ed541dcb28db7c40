#include "common/check.h"

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>

#include "tango/common.h"

namespace tango {
namespace {

thread_local char last_error[256] = "";

}  // namespace

int fail(int status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof(last_error), format, arguments);
    va_end(arguments);
    return status;
}

int check_ranges(std::initializer_list<Range> ranges) {
    for (const Range& range : ranges)
        if (range.value < range.min || range.value > range.max)
            return fail(TANGO_BAD_ARGUMENT, "%s is %lld: it must be from %lld to %lld", range.name, range.value,
                        range.min, range.max);
    return TANGO_OK;
}

int check_multiple(const char* name, int value, int factor) {
    if (value % factor == 0) return TANGO_OK;
    return fail(TANGO_BAD_ARGUMENT, "%s is %d: it must be a multiple of %d", name, value, factor);
}

bool is_quantized(int dtype) { return dtype == TANGO_FP8 || dtype == TANGO_INT8; }

int check_scale(const char* name, int dtype, float scale) {
    if (!is_quantized(dtype) || (scale > 0.0f && std::isfinite(scale))) return TANGO_OK;
    return fail(TANGO_BAD_ARGUMENT, "%s is %g: it must be finite and above 0", name, static_cast<double>(scale));
}

int check_result(int dtype, int y_dtype, float y_scale) {
    if (y_dtype != dtype && !is_quantized(y_dtype))
        return fail(TANGO_BAD_ARGUMENT, "y_dtype is %d: it must be dtype, which is %d, or %d or %d", y_dtype, dtype,
                    TANGO_FP8, TANGO_INT8);
    return check_scale("y_scale", y_dtype, y_scale);
}

int check_pointer(const char* name, const void* pointer, size_t alignment) {
    if (pointer == nullptr) return fail(TANGO_BAD_ARGUMENT, "%s is null", name);
    if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
        return fail(TANGO_BAD_ARGUMENT, "%s is at %p: it must be aligned to %zu bytes", name, pointer, alignment);
    return TANGO_OK;
}

}  // namespace tango

const char* tango_last_error(void) { return tango::last_error; }
