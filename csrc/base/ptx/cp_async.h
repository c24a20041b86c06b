// Asynchronous copies of sm_80 from global to shared memory.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace flash::ptx {

// cp.async.cg: 16 bytes past L1 to `shared` + kOffset, both addresses multiples of 16. Only the first
// `bytes` (0..16) are read, the others become 0; of 0 bytes the source may lie anywhere (PTX ISA,
// "Data Movement and Conversion Instructions: cp.async").
template <int kOffset>
FLASH_DEVICE void cp_async_16_bytes(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %1], [%2], 16, %3;" ::"r"(shared),
               "n"(kOffset), "l"(global), "r"(bytes)
               : "memory");
}

// cp.async.commit_group: the copies of this thread since the last one form a group (PTX ISA,
// "cp.async.commit_group").
FLASH_DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group: waits until at most kPending of this thread's latest groups are under way
// (PTX ISA, "cp.async.wait_group").
template <int kPending>
FLASH_DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace flash::ptx
