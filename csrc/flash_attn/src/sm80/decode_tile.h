// What a CTA of the decode kernels does around its loop over keys.
#pragma once

#include "sm80/decode_append.h"
#include "sm80/decode_output.h"
#include "warp/find_sequence.h"

namespace flash::sm80 {

// attend(total, here, units): this CTA's units, merged into `total` if it has the tile for itself,
// else kept in the workspace.
template <DecodeConfig C, class Attend>
FLASH_DEVICE void decode_tile(const FwdParams& p, const DecodeLaunch& launch, SmemPlan<C>& plan,
                              const Attend& attend) {
  DecodePlace<C> here(p, launch, ptx::read_ctaid_x());
  if (here.batch == p.b) return store_rows_of_no_sequence<C>(p, launch, here);
  find_sequence(here, p, launch, plan.sequence);
  check_pages(p, launch, here);
  if (here.rows <= 0) return;
  const KeyUnits<C> units(launch, here);
  if (here.sharer >= units.mine.sharers) return;
  if (launch.new_rows > 0) append_keys<C>(p, launch, here, units);

  Total<C> total;
  if (units.count > 0) attend(total, here, units);
  if (units.mine.sharers > 1) {
    if (!arrives_last(launch.arrivals + here.tile, units.mine.sharers, plan.is_last)) return;
    Unit unit = kept_unit<C>(launch, here.tile, 0);
#pragma unroll 4
    for (int i = 0; i < units.count; ++i, unit.skip(launch.unit_rows))
      total.take(unit, here.rows, launch.scale_log2);
  }
  store_total<C>(p, launch, here, total);
}

}  // namespace flash::sm80
