// Integers of 4 and 8 bits as fp16, exactly, two at a time. An integer n in the lowest bits of fp16's 1024 makes it
// 1024 + n. Four bits higher it makes 1024 + 16 n, of which a sixteenth is 64 + n.
#pragma once

#include <cstdint>

#include "common/platform.cuh"

namespace tango {

constexpr uint32_t k1024 = 0x64006400u;  // twice

__device__ inline uint32_t bits_of(const __half2& pair) { return *reinterpret_cast<const uint32_t*>(&pair); }

__device__ inline __half2 half2_of(uint32_t bits) { return *reinterpret_cast<const __half2*>(&bits); }

__device__ inline uint32_t add2(uint32_t a, uint32_t b) { return bits_of(__hadd2(half2_of(a), half2_of(b))); }

__device__ inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    return bits_of(__hfma2(half2_of(a), half2_of(b), half2_of(c)));
}

__device__ inline uint32_t mul2(uint32_t a, uint32_t b) { return bits_of(__hmul2(half2_of(a), half2_of(b))); }

// An integer n alone in the lowest bits of fp16 is a subnormal number, n kSubnormal. Tensor cores take it as it is.
constexpr float kSubnormal = 1.0f / (1 << 24);

// Eight unsigned integers of 4 or 8 bits (Eight) as pairs of such numbers, in an order that takes the fewest
// instructions: pair i has element i % 2 * 8 / kDistance + i / 2 and what is kDistance after it. Pairs 2 and 3 are kOdd
// times what they should be. A vector of 16 bytes has several eights.
template <int kBits>
struct PackedInts;

template <>
struct PackedInts<4> {
    using Eight = uint32_t;
    static constexpr int kDistance = 4, kOdd = 16;

    __device__ static Eight eight(const uint4& vector, int part) {
        return part == 0 ? vector.x : part == 1 ? vector.y : part == 2 ? vector.z : vector.w;
    }

    __device__ static void unpack(uint32_t (&pairs)[4], Eight word) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            pairs[i] = word >> 8 * i & 0x000f000fu;
            pairs[i + 2] = word >> 8 * i & 0x00f000f0u;
        }
    }
};

template <>
struct PackedInts<8> {
    using Eight = uint2;
    static constexpr int kDistance = 2, kOdd = 1;

    __device__ static Eight eight(const uint4& vector, int part) {
        return part == 0 ? make_uint2(vector.x, vector.y) : make_uint2(vector.z, vector.w);
    }

    __device__ static void unpack(uint32_t (&pairs)[4], Eight words) {
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = __byte_perm(i % 2 == 0 ? words.x : words.y, 0, i < 2 ? 0x4240 : 0x4341);
    }
};

// Elements 2 t and 2 t + 1 of a word's eight: byte t.
__device__ inline uint32_t unpack_pair(uint32_t word, int t, uint32_t at_1024_and_64) {
    constexpr uint32_t kOneAndSixteenth = 0x2c003c00u;
    return fma2((__byte_perm(word, 0, 0x4040u + t * 0x101u) & 0x00f0000fu) | k1024, kOneAndSixteenth, at_1024_and_64);
}

// Elements 2 t and 2 t + 1 of eight bytes.
__device__ inline uint32_t unpack_pair(const uint2& words, int t, uint32_t at_1024) {
    return add2((__byte_perm(words.x, words.y, 0x0100u + t * 0x202u) & 0x00ff00ffu) | k1024, at_1024);
}

// Signed bytes: those at two places of a word.
template <int kFirst, int kSecond>
__device__ uint32_t unpack_signed(uint32_t word) {
    constexpr uint32_t kMinus1152 = 0xe480e480u;
    return add2(__byte_perm(word ^ 0x80808080u, k1024, 0x5050 | kFirst | kSecond << 8), kMinus1152);
}

}  // namespace tango
