// What lies where in a decode CTA's shared memory.
#pragma once

#include <cstdint>

#include "common/seqlen.h"
#include "hopper/decode_table.h"
#include "hopper/smem.h"
#include "warp/decode_place.h"
#include "warp/smem_tile.h"

namespace flash::hopper {

// What the warpgroups that share a block tell each other; nothing if there is one.
template <int kWarpgroups>
struct DecodeExchange {
  alignas(16) uint32_t probabilities[kWarpgroups][2][kWarpgroupThreads][4];
  float rows[2][kWarpgroups][kWarpgroupRows];  // maxima of a block, sums of a unit
};
template <>
struct DecodeExchange<1> {};

template <DecodeConfig C>
struct DecodeSmem {
  static constexpr DecodeTile kTile = C.tile();
  using Q = SmemTile<C.head_dim, kWarpgroupRows>;
  using K = SmemTile<C.head_dim, kTile.n>;
  using V = SmemTile<C.head_dim_v, kTile.n>;
  using O = SmemTile<C.warp_columns(), kWarpgroupRows>;  // of a warpgroup
  static constexpr int kTotalTiles = kTile.total_in_shared ? C.warp_columns() / 8 : 1;
  static constexpr int kSlotsOfV = kTile.v_within_k ? 0 : kTile.stages;
  // V's groups are the first of K's.
  static_assert(!kTile.v_within_k || int{K::kGroupBytes} == int{V::kGroupBytes});
  static_assert(O::kBytes * kTile.warpgroups <= Q::kBytes);

  static_assert(!kTile.total_in_shared || kTile.warpgroups == 1);

  alignas(kTileAlignment) char q[Q::kBytes];  // then the output
  alignas(kTileAlignment) char k[kTile.stages][K::kBytes];
  alignas(kTileAlignment) char v[kSlotsOfV > 0 ? kSlotsOfV* V::kBytes : 16];
  alignas(16) float total[kTotalTiles][kTotalTiles > 1 ? kWarpgroupThreads : 1][4];
  DecodeExchange<kTile.warpgroups> exchange;
  RingBarriers<kTile.stages> k_barriers, v_barriers;
  Sequence sequence;
  // Read again where they are needed: registers are short.
  DecodePlace<C> here;
  KeyUnits<C> units;
  int is_last;                                // of the CTAs that share the tile
  uint8_t not_finite[2][C.consumer_warps()];  // by warp: what it has seen of a block of V
};

}  // namespace flash::hopper
