// What warpgroups of a CTA do to each other and to themselves.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace flash::ptx {

// setmaxnreg: each thread of this warpgroup gives up, or waits for and takes, registers down or up
// to kRegisters, a multiple of 8 (PTX ISA, "Miscellaneous Instructions: setmaxnreg").
template <int kRegisters>
FLASH_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FLASH_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// bar.sync: waits until `threads` threads have come to barrier `id`, 1..15, this warp's among them
// (PTX ISA, "Parallel Synchronization and Communication Instructions: bar").
FLASH_DEVICE void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// bar.arrive: comes to it without waiting.
FLASH_DEVICE void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// bar.red.or: as bar_sync; whether `x` holds for any of the threads.
FLASH_DEVICE bool bar_sync_or(int id, int threads, bool x) {
  uint32_t any;
  asm volatile(
      "{\n .reg .pred p, q;\n"
      " setp.ne.b32 p, %3, 0;\n"
      " bar.red.or.pred q, %1, %2, p;\n"
      " selp.b32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<uint32_t>(x))
      : "memory");
  return any != 0;
}

}  // namespace flash::ptx
