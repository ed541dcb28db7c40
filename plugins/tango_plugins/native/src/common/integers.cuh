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

// Unsigned integers of 4 or 8 bits in vectors of 16 bytes, as pairs of such numbers. Of a vector's eight elements
// `part`, pair i has first(i) and second(i): an order that takes the fewest instructions. Pairs 2 and 3 are kOdd times
// what they should be.
template <int kBits>
struct PackedInts;

template <>
struct PackedInts<4> {
    static constexpr float kOdd = 16;

    __device__ static constexpr int first(int i) { return i % 2 * 2 + i / 2; }
    __device__ static constexpr int second(int i) { return first(i) + 4; }

    __device__ static void unpack(uint32_t (&pairs)[4], const uint4& vector, int part) {
        const uint32_t word = part == 0 ? vector.x : part == 1 ? vector.y : part == 2 ? vector.z : vector.w;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            pairs[i] = word >> 8 * i & 0x000f000fu;
            pairs[i + 2] = word >> 8 * i & 0x00f000f0u;
        }
    }
};

template <>
struct PackedInts<8> {
    static constexpr float kOdd = 1;

    __device__ static constexpr int first(int i) { return i / 2 * 4 + i % 2; }
    __device__ static constexpr int second(int i) { return first(i) + 2; }

    __device__ static void unpack(uint32_t (&pairs)[4], const uint4& vector, int part) {
        const uint32_t words[2] = {part == 0 ? vector.x : vector.z, part == 0 ? vector.y : vector.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = __byte_perm(words[i / 2], 0, i % 2 == 0 ? 0x4240 : 0x4341);
    }
};

// A zero point z as what is added to integers: -(1024 + z), and -(64 + z) for z below 16, each twice.
struct ZeroPoint {
    uint32_t at_1024, at_64;

    __device__ explicit ZeroPoint(uint32_t z)
        : at_1024(0xe400e400u + z * 0x10001u), at_64(0xd400d400u + z * 0x100010u) {}
};

// Elements i and i + 4 of a word's eight less their zero point, for i from 0 to 3: an order that takes the fewest
// instructions.
__device__ inline void unpack(uint32_t (&pairs)[4], uint32_t word, const ZeroPoint& zero) {
    constexpr uint32_t kSixteenth = 0x2c002c00u;
#pragma unroll
    for (int i = 0; i < 4; i += 2, word >>= 8) {
        pairs[i] = add2((word & 0x000f000fu) | k1024, zero.at_1024);
        pairs[i + 1] = fma2((word & 0x00f000f0u) | k1024, kSixteenth, zero.at_64);
    }
}

// The same of eight bytes.
__device__ inline void unpack(uint32_t (&pairs)[4], const uint2& words, const ZeroPoint& zero) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t four = __byte_perm(words.x, words.y, i == 0 ? 0x5140 : 0x7362);
        pairs[i] = add2(__byte_perm(four, k1024, 0x5150), zero.at_1024);
        pairs[i + 1] = add2(__byte_perm(four, k1024, 0x5352), zero.at_1024);
    }
}

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
