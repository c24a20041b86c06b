// Masks of a warp's scores.
#pragma once

#include <cmath>
#include <cstdint>

#include "base/ptx/fragments.h"
#include "base/ptx/special_registers.h"
#include "common/mask.h"
#include "warp/score_class.h"
#include "warp/warp_tile.h"

namespace flash {

// -2^30..2^30, beyond which the ends of masks make no difference to a tile.
FLASH_DEVICE int saturate(int64_t x) {
  constexpr int64_t kFar = 1 << 30;
  return static_cast<int>(x < -kFar ? -kFar : x > kFar ? kFar : x);
}

// Hides the scores of keys that their query does not see. `first_row` and `first_key` are those of
// the warp's tile.
template <auto C>
FLASH_DEVICE void apply_mask(typename WarpTile<C>::Scores& rS, const Mask& mask, int first_row,
                             int first_key) {
  using W = WarpTile<C>;
  constexpr bool kMasked = C.scores != ScoreClass::kUnmasked;
  const ptx::Element first = ptx::accumulator_element(ptx::read_tid_x() % 32, 0);
  // In columns from this lane's first on; the ends of its first row, from which a row's grow by
  // one.
  const int column = first_key + first.col;
  const int64_t diagonal =
      int64_t{ptx::opaque(first_row)} + first.row + mask.seqlen_k - mask.seqlen_q - column;
  const int last = mask.seqlen_k - column;
  const int first_begin = mask.left < 0 ? saturate(INT64_MIN) : saturate(diagonal - mask.left);
  const int first_end = mask.right < 0 ? saturate(INT64_MAX) : saturate(diagonal + mask.right + 1);
#pragma unroll
  for (int m = 0; m < W::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + half * 8;
      const int begin = first_begin + row, end = kMasked ? min(first_end + row, last) : last;
#pragma unroll
      for (int n = 0; n < W::kS; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = n * 8 + i;
          const bool seen = key < end && (!kMasked || key >= begin);
          if (!seen) rS[m][n][2 * half + i] = -INFINITY;
        }
      }
    }
  }
}

}  // namespace flash
