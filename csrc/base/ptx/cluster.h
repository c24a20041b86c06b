// Clusters of CTAs, which run at the same time and reach each other's shared memory (PTX ISA,
// "Programming Model: Cluster of Cooperative Thread Arrays").
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace flash::ptx {

// %cluster_ctarank (PTX ISA, "Special Registers: %cluster_ctarank").
FLASH_DEVICE int read_cluster_ctarank() {
  int x;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return x;
}

// barrier.cluster: waits for all threads of the cluster, and shows each what the others have done
// (PTX ISA, "Parallel Synchronization and Communication Instructions: barrier.cluster").
FLASH_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// mapa: where CTA `rank` has what is at `shared` here (PTX ISA, "Data Movement and Conversion
// Instructions: mapa").
FLASH_DEVICE uint32_t map_shared(uint32_t shared, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// mbarrier.arrive of a CTA of the cluster: `barrier` is of map_shared.
FLASH_DEVICE void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
               : "memory");
}

}  // namespace flash::ptx
