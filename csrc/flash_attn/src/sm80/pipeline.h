// The ring of shared memory that blocks of K and V pass through.
//
// K and V take turns: K of the last block, V of the last block, K of the one before, ... A step
// reads one slot. It waits for the slot's copies, then for all warps, which have then left the slot
// that the step before read; into that slot goes the block that is needed kStages - 1 steps later.
// With an odd number of slots that is a block of the tensor that this step reads, (kStages - 1) / 2
// blocks ahead.
#pragma once

#include "base/host_device.h"

namespace flash::sm80 {

template <int kStages>
struct PipeState {
  int slot = 0;  // that this step reads

  FLASH_INLINE void advance() { slot = slot + 1 == kStages ? 0 : slot + 1; }
  // That the step before has read.
  FLASH_INLINE int freed() const { return slot == 0 ? kStages - 1 : slot - 1; }
};

}  // namespace flash::sm80
