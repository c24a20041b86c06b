// How a CTA of the decode kernels finds its sequence.
#pragma once

#include "base/ptx/special_registers.h"
#include "common/bounded_sequence.h"
#include "warp/decode_place.h"
#include "warp/report.h"

namespace flash {

// One thread reads index tensors and checks them: the others need no registers for it.
template <auto C, class Params>
FLASH_DEVICE void find_sequence(DecodePlace<C>& here, const Params& p, const DecodePlan& launch,
                                Sequence& found) {
  if (ptx::read_tid_x() == 0) {
    IndexFaults faults;
    found = bounded_sequence(p, here.batch, launch.bounds.max_cached, faults);
    if (faults != 0) report(launch.bounds, faults);
  }
  __syncthreads();
  here.take(p, launch, found);
}

// One CTA of each sequence looks for pages that do not exist.
template <auto C>
FLASH_DEVICE void check_pages(const SequenceGeometry& p, const DecodePlan& launch,
                              const DecodePlace<C>& here) {
  if (here.seq.pages == nullptr || here.sharer != 0 || here.first_row != 0 || here.head_k != 0)
    return;
  const IndexFaults faults = page_faults(here.seq, launch.page_size, p.k_entries, C.threads());
  if (faults != 0) report(launch.bounds, faults);
}

}  // namespace flash
