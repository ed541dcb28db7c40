// Hopper's warpgroup products (sm_90a): 128 threads multiply operands in shared memory, asynchronously.
#pragma once

#include <cstdint>

namespace tango {

// Makes a thread's stores and cp.async to shared memory visible to wgmma. Every writing thread calls it, before a
// barrier.
__device__ inline void wgmma_publish() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Waits until at most `kPending` of the latest groups are in flight.
template <int kPending>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of an accumulator across a wait.
template <int kCount>
__device__ inline void wgmma_hold(float (&c)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// The same for an operand in registers, which must not change before the wait.
template <int kCount>
__device__ inline void wgmma_hold(uint32_t (&a)[kCount][4]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(a[i][j])::"memory");
}

// Descriptor of an operand: rows of kWords 16-byte words, swizzled as by swizzled() in prune/gram.cuh.
template <int kWords>
__device__ uint64_t wgmma_operand(uint32_t address) {
    constexpr uint64_t kEightRows = 8 * kWords, kLayout = kWords == 8 ? 1 : 2;
    return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | kEightRows << 32 | kLayout << 62;
}

// Descriptors of an operand that is stored by columns of 16-byte words, kPitch bytes apart: word w of row r is at
// w kPitch + 16 r. wgmma_rows() is for one whose words run along the sum, as those of queries and keys do;
// wgmma_columns() for one whose rows do, as those of values.
template <int kPitch>
__device__ uint64_t wgmma_rows(uint32_t address) {
    constexpr uint64_t kWord = kPitch / 16, kEightRows = 8;
    return (address & 0x3ffff) >> 4 | kWord << 16 | kEightRows << 32;
}

template <int kPitch>
__device__ uint64_t wgmma_columns(uint32_t address) {
    constexpr uint64_t kWord = kPitch / 16, kEightRows = 8;
    return (address & 0x3ffff) >> 4 | kEightRows << 16 | kWord << 32;
}

// The accumulators of an instruction as operands of inline assembly: numbers of 32 registers, and 4 or 32 elements.
#define TANGO_0_31                                            \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "           \
    "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TANGO_32_63                                           \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, " \
    "%43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
    "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TANGO_64_95                                           \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, " \
    "%75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define TANGO_96_127                                                     \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, "     \
    "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, " \
    "%118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TANGO_C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define TANGO_C32(i)                                                                                     \
    TANGO_C4(i), TANGO_C4(i + 4), TANGO_C4(i + 8), TANGO_C4(i + 12), TANGO_C4(i + 16), TANGO_C4(i + 20), \
        TANGO_C4(i + 24), TANGO_C4(i + 28)

// c[64, 256] (+)= a[64, 16] b[256, 16]^T
__device__ inline void wgmma(float (&c)[128], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" TANGO_0_31 ", " TANGO_32_63 ", " TANGO_64_95
        ", " TANGO_96_127 "}, %128, %129, p, 1, 1, 0, 0;\n}\n"
        : TANGO_C32(0), TANGO_C32(32), TANGO_C32(64), TANGO_C32(96)
        : "l"(a), "l"(b), "r"(accumulate));
}

// c[64, 192] (+)= a[64, 16] b[192, 16]^T
__device__ inline void wgmma(float (&c)[96], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16 {" TANGO_0_31 ", " TANGO_32_63 ", " TANGO_64_95
        "}, %96, %97, p, 1, 1, 0, 0;\n}\n"
        : TANGO_C32(0), TANGO_C32(32), TANGO_C32(64)
        : "l"(a), "l"(b), "r"(accumulate));
}

// c[64, 128] (+)= a[64, 16] b[128, 16]^T
__device__ inline void wgmma(float (&c)[64], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" TANGO_0_31 ", " TANGO_32_63
        "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
        : TANGO_C32(0), TANGO_C32(32)
        : "l"(a), "l"(b), "r"(accumulate));
}

// c[64, 80] (+)= a[64, 16] b[80, 16]^T, with a in registers, as mma() has it.
__device__ inline void wgmma(float (&c)[40], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %45, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.f16.f16 {" TANGO_0_31
        ", %32, %33, %34, %35, %36, %37, %38, %39"
        "}, {%40, %41, %42, %43}, %44, p, 1, 1, 0;\n}\n"
        : TANGO_C32(0), TANGO_C4(32), TANGO_C4(36)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// c[64, 96] (+)= a[64, 16] b[96, 16]^T, with a in registers, as mma() has it.
__device__ inline void wgmma(float (&c)[48], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %53, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 {" TANGO_0_31
        ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
        "}, {%48, %49, %50, %51}, %52, p, 1, 1, 0;\n}\n"
        : TANGO_C32(0), TANGO_C4(32), TANGO_C4(36), TANGO_C4(40), TANGO_C4(44)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// c[64, 128] (+)= a[64, 16] b[128, 16]^T, with a in registers, as mma() has it.
__device__ inline void wgmma(float (&c)[64], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" TANGO_0_31 ", " TANGO_32_63
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}\n"
        : TANGO_C32(0), TANGO_C32(32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// c[64, 64] += a[64, 16] b[16, 64], with a in registers, as mma() has it, and the rows of b along the sum.
__device__ inline void wgmma(float (&c)[32], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" TANGO_0_31
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
                 : TANGO_C32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// c[64, 72] += a[64, 16] b[16, 72], with a in registers, as mma() has it, and the rows of b along the sum.
__device__ inline void wgmma(float (&c)[36], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n72k16.f32.f16.f16 {" TANGO_0_31
                 ", %32, %33, %34, %35"
                 "}, {%36, %37, %38, %39}, %40, 1, 1, 1, 1;\n"
                 : TANGO_C32(0), TANGO_C4(32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// c[64, 80] += a[64, 16] b[16, 80], with a in registers, as mma() has it, and the rows of b along the sum.
__device__ inline void wgmma(float (&c)[40], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n80k16.f32.f16.f16 {" TANGO_0_31
                 ", %32, %33, %34, %35, %36, %37, %38, %39"
                 "}, {%40, %41, %42, %43}, %44, 1, 1, 1, 1;\n"
                 : TANGO_C32(0), TANGO_C4(32), TANGO_C4(36)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// c[64, 88] += a[64, 16] b[16, 88], with a in registers, as mma() has it, and the rows of b along the sum.
__device__ inline void wgmma(float (&c)[44], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n88k16.f32.f16.f16 {" TANGO_0_31
                 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43"
                 "}, {%44, %45, %46, %47}, %48, 1, 1, 1, 1;\n"
                 : TANGO_C32(0), TANGO_C4(32), TANGO_C4(36), TANGO_C4(40)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// c[64, 128] += a[64, 16] b[16, 128], with a in registers, as mma() has it, and the rows of b along the sum.
__device__ inline void wgmma(float (&c)[64], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" TANGO_0_31 ", " TANGO_32_63
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
                 : TANGO_C32(0), TANGO_C32(32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// c[64, 136] += a[64, 16] b[16, 136], with a in registers, as mma() has it, and the rows of b along the sum.
__device__ inline void wgmma(float (&c)[68], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n136k16.f32.f16.f16 {" TANGO_0_31 ", " TANGO_32_63
                 ", %64, %65, %66, %67"
                 "}, {%68, %69, %70, %71}, %72, 1, 1, 1, 1;\n"
                 : TANGO_C32(0), TANGO_C32(32), TANGO_C4(64)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef TANGO_0_31
#undef TANGO_32_63
#undef TANGO_64_95
#undef TANGO_96_127
#undef TANGO_C4
#undef TANGO_C32

}  // namespace tango
