// The merge of units whose outputs are accumulators.
#pragma once

#include "base/ptx/math.h"
#include "common/softmax.h"
#include "warp/warp_tile.h"

namespace flash {

// result: the outputs of a total and of a further unit, as accumulators of one m16 tile; `rows` are
// the total's states and take in the unit's. total_of(n) and unit_of(n) are those of n8 tile n, and
// may be read from `result`.
template <auto C, class TotalOf, class UnitOf>
FLASH_DEVICE void merge_accumulators(typename WarpTile<C>::Output& result,
                                     typename WarpTile<C>::Rows& rows,
                                     const typename WarpTile<C>::Rows& unit_rows, float scale_log2,
                                     const TotalOf& total_of, const UnitOf& unit_of) {
  static_assert(WarpTile<C>::kM == 1);
  MergeFactors factors[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    factors[half] =
        merge(rows[0][half], unit_rows[0][half], [=](float x) { return ptx::ex2(x * scale_log2); });
#pragma unroll
  for (int n = 0; n < WarpTile<C>::kO; ++n) {
    // Loads of so many at a time, for the registers' sake: ptxas moves none across.
    if (WarpTile<C>::kO > 8 && n % 8 == 0) __syncwarp();
    const float4 total = total_of(n), unit = unit_of(n);
    float(&r)[4] = result[0][n];
    r[0] = fmaf(unit.x, factors[0].part, total.x * factors[0].total);
    r[1] = fmaf(unit.y, factors[0].part, total.y * factors[0].total);
    r[2] = fmaf(unit.z, factors[1].part, total.z * factors[1].total);
    r[3] = fmaf(unit.w, factors[1].part, total.w * factors[1].total);
  }
}

// n8 tile n of accumulators in registers.
template <class Output>
FLASH_DEVICE float4 accumulators_of(const Output& r, int n) {
  return make_float4(r[0][n][0], r[0][n][1], r[0][n][2], r[0][n][3]);
}

}  // namespace flash
