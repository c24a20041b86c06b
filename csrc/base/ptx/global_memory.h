// Global memory beyond C++'s loads and stores.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace flash::ptx {

// st.relaxed.sys: a store that the host sees, and that races with no other (PTX ISA, "Data Movement
// and Conversion Instructions: st").
FLASH_DEVICE void store_relaxed_sys(uint32_t* address, uint32_t x) {
  asm volatile("st.relaxed.sys.b32 [%0], %1;" ::"l"(address), "r"(x) : "memory");
}

}  // namespace flash::ptx
