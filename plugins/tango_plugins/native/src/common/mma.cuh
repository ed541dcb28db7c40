// Tensor core instructions that every architecture from sm_75 on has.
#pragma once

#include "common/copy.cuh"

namespace tango {

// c[16, 8] += a[16, 16] b[8, 16]^T, fp16 operands, fp32 accumulation.
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int half = 0; half < 2; ++half)
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};\n"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

// c[16, 8] += a[16, 32] b[8, 32]^T, signed operands of 8 bits, sums of 32.
__device__ inline void mma(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
    for (int part = 0; part < 4; ++part)  // upper and lower rows, of either half of the sum
        asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};\n"
                     : "+r"(c[part % 2 * 2]), "+r"(c[part % 2 * 2 + 1])
                     : "r"(a[part]), "r"(b[part / 2]));
#endif
}

// Loads four 8 x 8 matrices of fp16. Lane i passes the address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(uint32_t (&registers)[4], SharedAddress address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
}

// The same, with each matrix transposed.
__device__ inline void load_transposed(uint32_t (&registers)[4], SharedAddress address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
}

// Stores two 8 x 8 matrices of fp16, from sm_90 on. Lanes 0 to 15 pass the addresses of their 16 rows.
__device__ inline void store_matrices(const uint32_t (&registers)[2], SharedAddress address) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};\n" ::"r"(address), "r"(registers[0]),
                 "r"(registers[1])
                 : "memory");
}

}  // namespace tango
