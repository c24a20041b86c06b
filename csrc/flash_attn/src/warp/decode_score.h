// What decode kernels' scores go through, whose rows are of several heads.
#pragma once

#include "base/ptx/special_registers.h"
#include "warp/decode_place.h"
#include "warp/score.h"

namespace flash {

// rS: products of q and k become natural logits, softcap(softmax_scale s) - slope |distance|.
// `warp_row`: the warp's first row of the tile.
template <auto C>
FLASH_DEVICE void cap_and_slope(typename WarpTile<C>::Scores& rS, const ScoreParams& p,
                                const DecodePlace<C>& here, int first_key, int warp_row = 0) {
  if (p.softcap > 0.f) {
    cap_scores<C>(rS, p);
  } else {
    for_each_score<C>(rS, [&](float& s, int, int) { s *= p.scale_softmax; });
  }
  if (p.alibi_slopes == nullptr) return;
  const ptx::Element first = ptx::accumulator_element(ptx::read_tid_x() % 32, 0);
  float slope[2], distance[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = min(warp_row + first.row + 8 * half, here.rows - 1);
    slope[half] = p.alibi_slopes[here.batch * p.alibi_batch_stride + here.head(row)];
    const int diagonal = here.query(row) + here.seq.seqlen_k - here.seq.seqlen_q;
    distance[half] = static_cast<float>(diagonal - first_key - first.col);
  }
  for_each_score<C>(rS, [&](float& s, int row, int column) {
    s = fmaf(-slope[row / 8], fabsf(distance[row / 8] - static_cast<float>(column)), s);
  });
}

}  // namespace flash
