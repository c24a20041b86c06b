// Which scores of a warp's rows a mask hides.
#pragma once

#include <cstdint>

#include "base/ptx/fragments.h"
#include "base/ptx/special_registers.h"
#include "warp/mask.h"
#include "warp/warp_tile.h"

namespace flash::hopper {

// A lane holds columns 0, 1, 8, 9, 16, 17, ... from its first on: how many of them are below
// `column`.
FLASH_DEVICE int columns_below(int column) {
  return column <= 0 ? 0 : column / 8 * 2 + min(column % 8, 2);
}

// The `count` lowest bits, all from 32 on.
FLASH_DEVICE uint32_t low_bits(int count) { return count >= 32 ? 0xffffffffu : (1u << count) - 1u; }

// Hides the scores of one of a lane's rows whose columns, from this lane's first on, are not among
// [begin, end).
template <auto C>
FLASH_DEVICE void hide_columns(typename WarpTile<C>::Scores& rS, int half, int begin, int end) {
  using W = WarpTile<C>;
  static_assert(W::kM == 1 && W::kS <= 16);
  const uint32_t seen = low_bits(columns_below(end)) & ~low_bits(columns_below(begin));
#pragma unroll
  for (int n = 0; n < W::kS; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if ((seen & 1u << (2 * n + i)) == 0) rS[0][n][2 * half + i] = -INFINITY;
}

// Hides the scores of keys that their query does not see, by a bit for each that it does: so a
// score costs its bit and a select, whatever the mask. `first_row` and `first_key` are those of the
// warp's tile.
template <auto C>
FLASH_DEVICE void hide_scores(typename WarpTile<C>::Scores& rS, const Mask& mask, int first_row,
                              int first_key) {
  const ptx::Element first = ptx::accumulator_element(ptx::read_tid_x() % 32, 0);
  // In columns from this lane's first on: the ends of its first row, which grow by one a row.
  const int column = first_key + first.col;
  const int64_t diagonal = int64_t{first_row} + first.row + mask.seqlen_k - mask.seqlen_q - column;
  const int begin = mask.left < 0 ? saturate(INT64_MIN) : saturate(diagonal - mask.left);
  const int end = mask.right < 0 ? saturate(INT64_MAX) : saturate(diagonal + mask.right + 1);
#pragma unroll
  for (int half = 0; half < 2; ++half)
    hide_columns<C>(rS, half, begin + half * 8, min(end + half * 8, mask.seqlen_k - column));
}

}  // namespace flash::hopper
