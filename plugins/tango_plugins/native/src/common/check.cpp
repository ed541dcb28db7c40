#include "common/check.h"

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

int check_pointer(const char* name, const void* pointer, size_t alignment) {
    if (pointer == nullptr) return fail(TANGO_BAD_ARGUMENT, "%s is null", name);
    if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
        return fail(TANGO_BAD_ARGUMENT, "%s is at %p: it must be aligned to %zu bytes", name, pointer, alignment);
    return TANGO_OK;
}

}  // namespace tango

const char* tango_last_error(void) { return tango::last_error; }
