// What lies where in a decode CTA's shared memory.
#pragma once

#include <cstddef>

#include "common/seqlen.h"
#include "common/softmax.h"
#include "sm80/decode_table.h"
#include "sm80/smem.h"

namespace flash::sm80 {

template <DecodeConfig C>
  requires(!C.tile().warps_share_keys)
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

// Where warps share keys.
template <DecodeConfig C>
  requires(C.tile().warps_share_keys)
struct SmemPlan<C> {
  static constexpr DecodeTile kTile = C.tile();
  using Q = SmemTile<C.head_dim, kDecodeRows>;
  using K = SmemTile<C.head_dim, kTile.n>;
  using V = SmemTile<C.head_dim_v, kTile.n>;  // a prefix of K, where V is the first part of K
  static constexpr int kSlotBytes = std::max(K::kBytes, V::kBytes);
  static constexpr int kOutputStride = C.head_dim_v + 8;  // as above
  using Output = float[kDecodeRows][kOutputStride];

  union {
    alignas(1024) char ring[kTile.stages][kSlotBytes];
    alignas(1024) Output output;  // of all units, when the ring is done with
  };
  union {
    alignas(1024) char q[Q::kBytes];  // until it is in registers
    // Scores of a block, each warp's share of the sums: tile of 8 keys, lane, accumulator.
    alignas(16) float scores[kTile.warps][kTile.n / 8][32][4];
  };
  RowState states[kDecodeRows];  // of the output
  Sequence sequence;             // the CTA's
  int is_last;                   // of those that share the tile

  FLASH_INLINE static constexpr size_t q_offset() { return offsetof(SmemPlan, q); }
  FLASH_INLINE static constexpr size_t bytes() { return sizeof(SmemPlan); }
};

}  // namespace flash::sm80
