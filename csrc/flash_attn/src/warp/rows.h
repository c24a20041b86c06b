// The states of a warp's rows, each of which four lanes share.
#pragma once

#include <cmath>

#include "base/host_device.h"
#include "warp/warp_tile.h"

namespace flash {

// The largest of the four lanes that share a row.
FLASH_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

FLASH_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Rows that have seen nothing. By assignment: of a two-dimensional array nvcc 13.0 gives the
// members' default values to the first row alone, and leaves 0 in the others.
template <auto C>
FLASH_DEVICE void clear_rows(typename WarpTile<C>::Rows& rows) {
#pragma unroll
  for (int m = 0; m < WarpTile<C>::kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) rows[m][half] = RowState{-INFINITY, 0.f};
}

// Beyond this the rounding of scale_log2 * anchor would be seen in the probabilities.
constexpr float kMaxFusedAnchor = 1024.f;

}  // namespace flash
