// mbarriers: counts of arrivals and of bytes in shared memory, that threads wait for (PTX ISA,
// "Parallel Synchronization and Communication Instructions: mbarrier"). Addresses are those of
// shared memory, 8 bytes each.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace flash::ptx {

// mbarrier.init: a phase ends after `arrivals`, 1..2^20-1.
FLASH_DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// fence.mbarrier_init: shows this thread's mbarrier.init to other threads and to asynchronous
// copies, once they have synchronised with it (PTX ISA, "membar / fence").
FLASH_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive: releases what this thread has done to those who wait for the phase.
FLASH_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// mbarrier.arrive.expect_tx: and the phase has `bytes` more of copies to wait for.
FLASH_DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// mbarrier.try_wait.parity, until the phase of `parity` is complete: the first has 0. A wait for 1
// before any phase is complete returns at once.
FLASH_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

}  // namespace flash::ptx
