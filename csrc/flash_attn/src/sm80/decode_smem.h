// What lies where in a decode CTA's shared memory.
#pragma once

#include <cstddef>

#include "common/seqlen.h"
#include "common/softmax.h"
#include "sm80/decode_table.h"
#include "sm80/smem.h"

namespace flash::sm80 {

template <DecodeConfig C>
struct SmemPlan<C> {
  static constexpr DecodeTile kTile = C.tile();
  using Q = SmemTile<C.head_dim, kDecodeRows>;
  using K = SmemTile<C.head_dim, kTile.n>;  // of a warp
  using V = SmemTile<C.head_dim_v, kTile.n>;
  static constexpr int kSlotBytes = std::max(K::kBytes, V::kBytes);
  // 8 floats behind a row: the four rows that half a warp's accumulators touch lie in different
  // banks.
  static constexpr int kOutputStride = C.head_dim_v + 8;

  alignas(1024) char ring[kTile.warps][kTile.stages][kSlotBytes];
  alignas(1024) float output[kDecodeRows][kOutputStride];  // of a unit, summed over the warps
  float warp_max[kTile.warps][kDecodeRows], warp_sum[kTile.warps][kDecodeRows];
  RowState states[kDecodeRows];  // of a unit
  Sequence sequence;             // the CTA's
  int is_last;                   // of those that share the tile

  // Q lies where units' outputs will be, unless it is needed until the end.
  FLASH_INLINE static constexpr size_t q_offset() {
    return kTile.q_in_registers ? offsetof(SmemPlan, output) : sizeof(SmemPlan);
  }
  FLASH_INLINE static constexpr size_t bytes() {
    return sizeof(SmemPlan) + (kTile.q_in_registers ? 0 : Q::kBytes);
  }
  static_assert(!kTile.q_in_registers || Q::kBytes <= kDecodeRows * kOutputStride * 4);
};

}  // namespace flash::sm80
