// Telling the host of index tensors with elements out of range.
#pragma once

#include "base/fast_divide.h"
#include "base/ptx/global_memory.h"
#include "common/bounded_sequence.h"

namespace flash {

// Of the pages that hold the keys of a sequence in pages: this thread's share, of the `threads` of
// a CTA.
FLASH_DEVICE IndexFaults page_faults(const Sequence& seq, const FastDivide& page_size,
                                     int64_t pages, int threads) {
  IndexFaults faults = 0;
  if (seq.seqlen_k == 0) return faults;
  const int last = page_size.quotient(seq.leftpad + seq.seqlen_k - 1);
  for (int i = page_size.quotient(seq.leftpad) + threadIdx.x; i <= last; i += threads)
    faults |= fault_of(IndexTensor::kBlockTable, seq.pages[i] < 0 || seq.pages[i] >= pages);
  return faults;
}

FLASH_DEVICE void report(const IndexBounds& bounds, IndexFaults faults) {
#pragma unroll 1
  for (int i = 0; i < kIndexTensors; ++i)
    if (faults >> i & 1u) ptx::store_relaxed_sys(bounds.faults + i, 1);
}

}  // namespace flash
