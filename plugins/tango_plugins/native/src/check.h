// What the C interface does with a bad argument: a code, and a sentence that names it.
#pragma once

#include <cstddef>
#include <initializer_list>

namespace tango {

struct Range {
    const char* name;
    long long value, least, most;
};

// Keeps a sentence for tango_last_error, and gives the status back.
int fail(int status, const char* format, ...);

int check_ranges(std::initializer_list<Range> ranges);

// Not null, and aligned.
int check_pointer(const char* name, const void* pointer, size_t alignment);

}  // namespace tango
