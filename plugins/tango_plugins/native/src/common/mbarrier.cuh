// Barriers in shared memory that some threads arrive at and others wait for, and the registers of a warpgroup (sm_90a).
#pragma once

#include <cstdint>

namespace tango {

// A phase of the barrier ends with so many arrivals. Other threads may use it after mbarrier_publish() and a barrier of
// the block.
__device__ inline void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void mbarrier_publish() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }

__device__ inline void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Waits for the end of the phase of a parity: 0 for the first, third, ... phase. The one before the first has ended.
__device__ inline void mbarrier_wait(uint32_t barrier, int parity) {
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra.uni done;\n"
        "bra.uni again;\ndone:\n}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Changes how many registers each thread of a warpgroup has; all of the warpgroup's threads call it.
template <int kRegisters>
__device__ inline void keep_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

}  // namespace tango
