// Atomic operations on global memory.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace flash::ptx {

// atom.acq_rel.gpu.global.add.u32: returns what was there. Orders what this thread has done or seen
// before it ahead of what any thread of the device does after a later one (PTX ISA, "Parallel
// Synchronization and Communication Instructions: atom").
FLASH_DEVICE uint32_t atomic_add_acq_rel(uint32_t* address, uint32_t x) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(address)), "r"(x)
               : "memory");
  return before;
}

// ld.acquire.gpu: what was done before the store that released the value is done for this thread
// (PTX ISA, "Data Movement and Conversion Instructions: ld").
FLASH_DEVICE uint32_t load_acquire(const uint32_t* address) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(x)
               : "l"(__cvta_generic_to_global(address))
               : "memory");
  return x;
}

// st.release.gpu (PTX ISA, "Data Movement and Conversion Instructions: st").
FLASH_DEVICE void store_release(uint32_t* address, uint32_t x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)),
               "r"(x)
               : "memory");
}

}  // namespace flash::ptx
