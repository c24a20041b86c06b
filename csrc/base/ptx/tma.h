// The tensor memory accelerator of sm_90: copies of boxes of a tensor, of rank 4 here, between
// global and shared memory, by one thread (PTX ISA, "Data Movement and Conversion Instructions:
// cp.async.bulk.tensor"). `map` is the address of a tensor map: of cuTensorMapEncodeTiled, in the
// kernel's parameters. Coordinates are elements, innermost first; what lies outside the tensor is
// read as zeros and not written. Shared memory is a multiple of 128 bytes, of 1024 where the box is
// swizzled by 128 bytes.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "base/host_device.h"

namespace flash::ptx {

struct BoxPlace {
  int column, row, head, batch;
};

// prefetch.tensormap: fetches the map itself (PTX ISA, "prefetch").
FLASH_DEVICE void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// From global memory; tells `barrier` of the bytes as they arrive.
FLASH_DEVICE void tma_load(uint32_t shared, const CUtensorMap& map, const BoxPlace& at,
                           uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared),
      "l"(&map), "r"(at.column), "r"(at.head), "r"(at.row), "r"(at.batch), "r"(barrier)
      : "memory");
}

// The same into every CTA of the cluster whose bit of `ctas` is set, at this CTA's offsets; tells
// the barrier of each.
FLASH_DEVICE void tma_load_multicast(uint32_t shared, const CUtensorMap& map, const BoxPlace& at,
                                     uint32_t barrier, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(shared),
      "l"(&map), "r"(at.column), "r"(at.head), "r"(at.row), "r"(at.batch), "r"(barrier), "h"(ctas)
      : "memory");
}

// To global memory, as a part of this thread's group.
FLASH_DEVICE void tma_store(const CUtensorMap& map, const BoxPlace& at, uint32_t shared) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group "
      "[%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
      "r"(at.column), "r"(at.head), "r"(at.row), "r"(at.batch), "r"(shared)
      : "memory");
}

// cp.async.bulk: `bytes` contiguous bytes to global memory, as a part of this thread's group; all
// three are multiples of 16 (PTX ISA, "cp.async.bulk").
FLASH_DEVICE void bulk_store(float* global, uint32_t shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(global)),
               "r"(shared), "r"(bytes)
               : "memory");
}

// cp.reduce.async.bulk: the same, added to the fp32 numbers that are there, each by one rounding
// (PTX ISA, "cp.reduce.async.bulk").
FLASH_DEVICE void bulk_add(float* global, uint32_t shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(global)),
               "r"(shared), "r"(bytes)
               : "memory");
}

// cp.async.bulk.commit_group: this thread's stores since the last one form a group.
FLASH_DEVICE void bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// cp.async.bulk.wait_group.read: waits until all of this thread's groups have read shared memory.
FLASH_DEVICE void bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// cp.async.bulk.wait_group: waits until all of this thread's groups are complete, and have written.
FLASH_DEVICE void bulk_wait_group() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// fence.proxy.async.global: orders this thread's accesses to global memory, and what it has seen of
// others', before its bulk copies that follow, and those that it has waited for before what
// follows.
FLASH_DEVICE void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// fence.proxy.async: what this thread has written to shared memory is seen by TMA and wgmma, once
// they are ordered behind it (PTX ISA, "Memory Consistency Model: Proxies").
FLASH_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace flash::ptx
