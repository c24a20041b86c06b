// Telling the host that an index tensor has an element out of range.
#pragma once

#include "base/ptx/global_memory.h"
#include "common/bounded_sequence.h"

namespace flash::sm80 {

FLASH_DEVICE void report(const IndexBounds& bounds, IndexFaults faults) {
#pragma unroll 1
  for (int i = 0; i < kIndexTensors; ++i)
    if (faults >> i & 1u) ptx::store_relaxed_sys(bounds.faults + i, 1);
}

}  // namespace flash::sm80
