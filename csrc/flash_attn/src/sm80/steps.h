// The steps of FlashAttention-2's forward (arXiv:2307.08691, algorithm 1) for one warp, whose rows
// are kRows m16 tiles. Tensors by the paper's letters: s and g are shared and global memory, r
// registers.
#pragma once

#include <cstdint>

#include "base/ptx/fragments.h"
#include "base/ptx/math.h"
#include "base/ptx/mma.h"
#include "base/ptx/shared_memory.h"
#include "base/static_for.h"
#include "sm80/smem.h"
#include "warp/rows.h"
#include "warp/warp_tile.h"

namespace flash::sm80 {

// A lane's address of a 16 x 16 block's row for ldmatrix.
template <class Smem>
FLASH_DEVICE uint32_t lane_address(uint32_t tile, ptx::Chunk chunk) {
  return tile + Smem::offset(chunk.row, chunk.chunk);
}

// rS = sQ sK^T. `sQ` and `sK` are this lane's addresses in the first blocks.
template <auto C>
FLASH_DEVICE void gemm_qk(typename WarpTile<C>::Scores& rS, uint32_t sQ, uint32_t sK) {
  using W = WarpTile<C>;
  using Q = typename SmemPlan<C>::Q;
  using K = typename SmemPlan<C>::K;
#pragma unroll
  for (int m = 0; m < W::kM; ++m)
#pragma unroll
    for (int n = 0; n < W::kS; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) rS[m][n][i] = 0.f;
  static_for<C.head_dim / 16>([&](auto k) {
    uint32_t rQ[W::kM][4];
    static_for<W::kM>([&](auto m) {
      ptx::ldmatrix_x4<m * 16 * Q::kRowBytes + Q::ahead(k)>(rQ[m], sQ ^ Q::flip(k));
    });
    static_for<W::kS / 2>([&](auto n) {
      uint32_t rK[4];
      ptx::ldmatrix_x4<n * 16 * K::kRowBytes + K::ahead(k)>(rK, sK ^ K::flip(k));
#pragma unroll
      for (int m = 0; m < W::kM; ++m) {
        ptx::mma_m16n8k16<C.dtype>(rS[m][2 * n], rQ[m], rK[0], rK[1]);
        ptx::mma_m16n8k16<C.dtype>(rS[m][2 * n + 1], rQ[m], rK[2], rK[3]);
      }
    });
  });
}

// rP = 2^(scale_log2 (rS - anchor)), the unnormalised probabilities, and the rows' states with
// these scores; `sum` counts this lane's columns alone. `rescale` is what outputs of earlier blocks
// must be multiplied by. rS is used up: a large anchor is subtracted from it before the scale is
// multiplied, a small one by the same FMA.
template <auto C>
FLASH_DEVICE void softmax_step(typename WarpTile<C>::Probabilities& rP,
                               float (&rescale)[WarpTile<C>::kM][2],
                               typename WarpTile<C>::Scores& rS, typename WarpTile<C>::Rows& rows,
                               float scale_log2) {
  using W = WarpTile<C>;
#pragma unroll
  for (int m = 0; m < W::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RowState& row = rows[m][half];
      const float old_max = row.max;
#pragma unroll
      for (int n = 0; n < W::kS; ++n)
        row.max = fmaxf(row.max, fmaxf(rS[m][n][2 * half], rS[m][n][2 * half + 1]));
      row.max = quad_max(row.max);
      const float anchor = row.anchor();
      float scaled_anchor = anchor * scale_log2;
      if (fabsf(scaled_anchor) > kMaxFusedAnchor) {
#pragma unroll
        for (int n = 0; n < W::kS; ++n) {
          rS[m][n][2 * half] -= anchor;
          rS[m][n][2 * half + 1] -= anchor;
        }
        scaled_anchor = 0.f;
      }
      rescale[m][half] = ptx::ex2((old_max - anchor) * scale_log2);  // 1 where the maximum stays
      row.sum *= rescale[m][half];
#pragma unroll
      for (int n = 0; n < W::kS; ++n) {
        const float p0 = ptx::ex2(fmaf(rS[m][n][2 * half], scale_log2, -scaled_anchor));
        const float p1 = ptx::ex2(fmaf(rS[m][n][2 * half + 1], scale_log2, -scaled_anchor));
        row.sum += p0;
        row.sum += p1;
        rP[m][n][half] = ptx::pack<C.dtype>(p0, p1);
      }
    }
  }
}

// The warp's maxima seldom grow after the first blocks.
template <auto C>
FLASH_DEVICE void rescale_o(typename WarpTile<C>::Output& rO,
                            const float (&rescale)[WarpTile<C>::kM][2]) {
  using W = WarpTile<C>;
  bool changes = false;
#pragma unroll
  for (int m = 0; m < W::kM; ++m) changes |= rescale[m][0] != 1.f || rescale[m][1] != 1.f;
  if (!__any_sync(0xffffffffu, changes)) return;
#pragma unroll
  for (int m = 0; m < W::kM; ++m)
#pragma unroll
    for (int n = 0; n < W::kO; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) rO[m][n][i] *= rescale[m][i / 2];
}

// rO += rP sV. The accumulators of two n8 tiles of scores are operand A of 16 keys. `sV` is this
// lane's address in the first block.
template <auto C>
FLASH_DEVICE void gemm_pv(typename WarpTile<C>::Output& rO,
                          const typename WarpTile<C>::Probabilities& rP, uint32_t sV) {
  using W = WarpTile<C>;
  using V = typename SmemPlan<C>::V;
  static_for<W::kS / 2>([&](auto k) {
    uint32_t rA[W::kM][4];
#pragma unroll
    for (int m = 0; m < W::kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) rA[m][i] = rP[m][2 * k + i / 2][i % 2];
    static_for<W::kO / 2>([&](auto n) {
      uint32_t rV[4];
      ptx::ldmatrix_x4_trans<k * 16 * V::kRowBytes + V::ahead(n)>(rV, sV ^ V::flip(n));
#pragma unroll
      for (int m = 0; m < W::kM; ++m) {
        ptx::mma_m16n8k16<C.dtype>(rO[m][2 * n], rA[m], rV[0], rV[1]);
        ptx::mma_m16n8k16<C.dtype>(rO[m][2 * n + 1], rA[m], rV[2], rV[3]);
      }
    });
  });
}

}  // namespace flash::sm80
