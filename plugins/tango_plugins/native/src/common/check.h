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

int check_multiple(const char* name, int value, int factor);

// Whether a TangoDtype is FP8 or INT8.
bool is_quantized(int dtype);

// Rejects a scale of a quantized result that is not finite and above 0; other results have none.
int check_scale(const char* name, int dtype, float scale);

// Rejects a result that is neither of the type of the inputs nor quantized with a scale.
int check_result(int dtype, int y_dtype, float y_scale);

// Rejects null and misaligned pointers.
int check_pointer(const char* name, const void* pointer, size_t alignment);

}  // namespace tango
