// Asynchronous copies of sm_80 from global to shared memory.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace flash::ptx {

// cp.async.cg: 16 bytes past L1 from `global` + kFrom to `shared` + kTo, both addresses multiples
// of 16; without `read` nothing is read and the bytes become 0 (PTX ISA, "Data Movement and
// Conversion Instructions: cp.async"). Any other number of bytes would cost five instructions more:
// sm_80 has it in the low bits of the address.
template <int kTo, int kFrom>
FLASH_DEVICE void cp_async_16_bytes(uint32_t shared, const void* global, bool read) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %1], [%2 + %3], 16, %4;" ::"r"(shared),
               "n"(kTo), "l"(global), "n"(kFrom), "r"(read ? 16 : 0)
               : "memory");
}

// cp.async.ca: 4 bytes from `global` to `shared`, both multiples of 4; without `read` 0.
FLASH_DEVICE void cp_async_4_bytes(uint32_t shared, const void* global, bool read) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global),
               "r"(read ? 4 : 0)
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

// cp.async.mbarrier.arrive.noinc: an arrival at `barrier`, in shared memory, when this thread's
// copies so far are complete; it is one of those that the barrier was initialised with (PTX ISA,
// "cp.async.mbarrier.arrive").
FLASH_DEVICE void cp_async_mbarrier_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

}  // namespace flash::ptx
