// P V of e4m3. A product, or pv_columns of it, has accumulators of its own: those of the tensor
// core lose bits the more products they take in (docs/hopper.md, "FP8"). They go into rO with the
// factor of the block's v.
#pragma once

#include "base/ptx/shared_memory.h"
#include "base/ptx/wgmma.h"
#include "base/static_for.h"
#include "hopper/smem.h"
#include "warp/warp_tile.h"

namespace flash::hopper {

template <FwdConfig C>
using BlockOutput = float[C.tile().pv_columns / 8][4];

// Issues rT = rP sV of columns pv_columns * `part` on, with V transposed in `slot`.
template <FwdConfig C>
FLASH_DEVICE void issue_pv_8_bits(BlockOutput<C>& rT, const typename WarpTile<C>::Probabilities& rP,
                                  const char* slot, int part) {
  using Vt = typename SmemPlan<C>::Vt;
  constexpr int kSteps = Vt::kRowBytes / 32;  // of a product, in a group of columns
  const ptx::WgmmaMatrix v = ptx::wgmma_matrix<Vt::kRowBytes>(ptx::shared_address(slot)) +
                             part * C.tile().pv_columns * Vt::kRowBytes;
  ptx::wgmma_keep_in_order(rT);
  ptx::wgmma_fence();
  static_for<C.n() / 32>([&](auto i) {
    const uint32_t rA[4] = {rP[0][2 * i][0], rP[0][2 * i][1], rP[0][2 * i + 1][0],
                            rP[0][2 * i + 1][1]};
    ptx::wgmma_rs_e4m3(rT, rA, v + (i / kSteps * Vt::kGroupBytes + i % kSteps * 32), i > 0);
  });
  ptx::wgmma_commit_group();
}

// Adds rT to its columns of rO, each of this lane's two rows with its factor.
template <FwdConfig C>
FLASH_DEVICE void promote(typename WarpTile<C>::Output& rO, const BlockOutput<C>& rT,
                          const float (&factors)[2], int part) {
#pragma unroll
  for (int n = 0; n < C.tile().pv_columns / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& o = rO[0][part * C.tile().pv_columns / 8 + n][i];
      o = fmaf(rT[n][i], factors[i / 2], o);
    }
}

}  // namespace flash::hopper
