// Factors of numbers in e4m3: what they stand for is so many times as much.
#pragma once

#include "base/ptx/math.h"
#include "common/flash.h"
#include "hopper/fwd_params.h"
#include "hopper/smem.h"

namespace flash::hopper {

// Of the rows of a sequence that are block `block` of kDescaleRows.
FLASH_DEVICE float factor_of(const Descale& x, int batch, int head_k, int block) {
  if (x.ptr == nullptr) return 1.f;
  return x.ptr[batch * x.batch_stride + head_k * x.head_stride + block * x.block_stride];
}

// What makes the scores of a tile, if they are not modified, natural logits, but for factors of k
// by blocks. As in warp/launch_plan.h, of which the host does not know the factors; NaN stays NaN.
FLASH_DEVICE void set_scale(const FwdParams& p, const FwdLaunch& launch, WorkTile& tile) {
  constexpr float kLeast = 0x1p-126f;
  if (tile.place.batch >= p.b) return;
  const int batch = tile.place.batch, head_k = tile.head / launch.group;
  const float k = p.k_descale.block_stride != 0 ? 1.f : factor_of(p.k_descale, batch, head_k, 0);
  tile.factor = factor_of(p.q_descale, batch, head_k, tile.place.m_block) * k;
  const float scale = launch.modifies_scores ? 1.f : p.scale_softmax * tile.factor;
  tile.negate_q = scale < 0.f;
  tile.scale = ptx::max_nan(fabsf(scale), kLeast);
  tile.scale_log2 = ptx::max_nan(tile.scale * kLog2e, kLeast);
}

}  // namespace flash::hopper
