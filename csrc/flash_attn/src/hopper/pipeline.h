// Rings of slots in shared memory that a producer fills and consumers empty.
#pragma once

#include <cstdint>

#include "base/ptx/cluster.h"
#include "base/ptx/mbarrier.h"
#include "base/ptx/shared_memory.h"
#include "base/ptx/special_registers.h"
#include "hopper/smem.h"

namespace flash::hopper {

// `fills`, `leaves`: arrivals that fill and empty a slot.
template <int kSlots>
FLASH_DEVICE void init(RingBarriers<kSlots>& barriers, int fills, int leaves) {
  for (int i = 0; i < kSlots; ++i) {
    ptx::mbarrier_init(ptx::shared_address(&barriers.full[i]), fills);
    ptx::mbarrier_init(ptx::shared_address(&barriers.empty[i]), leaves);
  }
}

// Where one of the sides is: how many slots it has gone through, both in the same order.
template <int kSlots>
class RingPosition {
 public:
  static_assert((kSlots & (kSlots - 1)) == 0);

  FLASH_DEVICE int slot() const { return static_cast<int>(count_ % kSlots); }
  FLASH_DEVICE uint32_t phase() const { return count_ / kSlots % 2; }
  FLASH_DEVICE void advance() { ++count_; }
  FLASH_DEVICE RingPosition next() const { return ahead(1); }
  FLASH_DEVICE RingPosition ahead(int slots) const { return RingPosition(count_ + slots); }

  RingPosition() = default;
  FLASH_DEVICE explicit RingPosition(uint32_t count) : count_(count) {}

 private:
  uint32_t count_ = 0;
};

template <int kSlots>
FLASH_DEVICE uint32_t full(RingBarriers<kSlots>& barriers, const RingPosition<kSlots>& at) {
  return ptx::shared_address(barriers.full) + at.slot() * 8;
}
template <int kSlots>
FLASH_DEVICE uint32_t empty(RingBarriers<kSlots>& barriers, const RingPosition<kSlots>& at) {
  return ptx::shared_address(barriers.empty) + at.slot() * 8;
}

// The producer's: waits until the slot may be filled. At first all may.
template <int kSlots>
FLASH_DEVICE void wait_empty(RingBarriers<kSlots>& barriers, const RingPosition<kSlots>& at) {
  ptx::mbarrier_wait(empty(barriers, at), at.phase() ^ 1);
}

// A consumer's.
template <int kSlots>
FLASH_DEVICE void wait_full(RingBarriers<kSlots>& barriers, const RingPosition<kSlots>& at) {
  ptx::mbarrier_wait(full(barriers, at), at.phase());
}

// One arrival for a warp, in each CTA of a cluster. What the lanes have done themselves must have
// been brought together, by __syncwarp; what they have waited for is.
template <int kCluster = 1>
FLASH_DEVICE void arrive_as_warp(uint32_t barrier) {
  const int lane = ptx::read_tid_x() % 32;
  if constexpr (kCluster == 1) {
    if (lane == 0) ptx::mbarrier_arrive(barrier);
  } else {
    if (lane < kCluster) ptx::mbarrier_arrive_cluster(ptx::map_shared(barrier, lane));
  }
}

// A consumer warp's: it is done with the slot, which producers of all CTAs of a cluster fill.
template <int kCluster = 1, int kSlots>
FLASH_DEVICE void leave(RingBarriers<kSlots>& barriers, const RingPosition<kSlots>& at) {
  arrive_as_warp<kCluster>(empty(barriers, at));
}

}  // namespace flash::hopper
