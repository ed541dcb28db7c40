// src/mma.cuh on a CPU's threads: the lanes of a warp tell one another what they hold.
#pragma once

#include "gpu.cuh"

namespace tango {

inline float half_of(uint32_t pair, int which) {
    return __half2float(__half(__half_raw{static_cast<unsigned short>(pair >> 16 * which)}));
}

inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const int lane = lane_id();
    std::copy(a, a + 4, warp().left[lane]);
    std::copy(b, b + 2, warp().right[lane]);
    warp().barrier.arrive_and_wait();
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) {
            const int holder = k % 8 / 2, upper = k / 8, row = lane / 4, column = lane % 4 * 2 + i % 2;
            c[i] += half_of(warp().left[row * 4 + holder][i / 2 + 2 * upper], k % 2) *
                    half_of(warp().right[column * 4 + holder][upper], k % 2);
        }
    warp().barrier.arrive_and_wait();
}

// The row of a matrix that a lane names.
inline const char* shown(int lane) { return warp().addresses[lane]; }

inline void load_matrices(uint32_t (&registers)[4], SharedAddress address) {
    warp().addresses[lane_id()] = address;
    warp().barrier.arrive_and_wait();
    for (int m = 0; m < 4; ++m) std::memcpy(&registers[m], shown(8 * m + lane_id() / 4) + lane_id() % 4 * 4, 4);
    warp().barrier.arrive_and_wait();
}

inline void load_transposed(uint32_t (&registers)[4], SharedAddress address) {
    warp().addresses[lane_id()] = address;
    warp().barrier.arrive_and_wait();
    for (int m = 0; m < 4; ++m)
        for (int i = 0; i < 2; ++i) {
            const char* row = shown(8 * m + lane_id() % 4 * 2 + i);
            std::memcpy(reinterpret_cast<char*>(&registers[m]) + 2 * i, row + lane_id() / 4 * 2, 2);
        }
    warp().barrier.arrive_and_wait();
}

}  // namespace tango
