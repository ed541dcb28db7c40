// Elements that one instruction loads or stores.
#pragma once

namespace tango {

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
    T at[kSize];
};

}  // namespace tango
