// Argument checks of the C interface: a status, and a sentence for tango_last_error() that names the argument.
#pragma once

#include <cstddef>
#include <initializer_list>

namespace tango {

struct Range {
    const char* name;
    long long value, min, max;
};

// Stores a sentence for tango_last_error(), and returns the status.
int fail(int status, const char* format, ...);

int check_ranges(std::initializer_list<Range> ranges);

// Rejects null and misaligned pointers.
int check_pointer(const char* name, const void* pointer, size_t alignment);

}  // namespace tango
