// Elements that a thread loads or stores together, in pieces of 16 bytes at most.
#pragma once

namespace tango {

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize < 16 ? sizeof(T) * kSize : 16) Vector {
    T at[kSize];
};

}  // namespace tango
