// Special registers, read where a kernel says so: what is derived from a second reading need not be
// kept in registers since the first.
#pragma once

#include "base/host_device.h"

namespace flash::ptx {

// %ctaid.x (PTX ISA, "Special Registers: %ctaid").
FLASH_DEVICE int read_ctaid_x() {
  int x;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  return x;
}

// %tid.x (PTX ISA, "Special Registers: %tid").
FLASH_DEVICE int read_tid_x() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// x, of which the compiler does not know that it has not changed: what is computed from it stays
// where it is, instead of in registers from before a loop on.
FLASH_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Loads that come later in the source stay later.
FLASH_DEVICE void keep_loads_behind() { asm volatile("" ::: "memory"); }

}  // namespace flash::ptx
