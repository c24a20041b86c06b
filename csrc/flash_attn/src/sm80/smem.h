// What lies where in a CTA's shared memory.
#pragma once

#include <algorithm>

#include "sm80/tile_table.h"
#include "warp/packed_tiles.h"
#include "warp/smem_tile.h"

namespace flash::sm80 {

template <auto C>
struct SmemPlan {
  static constexpr Tile kTile = C.tile();
  using Q = SmemTile<C.head_dim, kTile.m>;
  using K = SmemTile<C.head_dim, kTile.n>;
  using V = SmemTile<C.head_dim_v, kTile.n>;
  using O = SmemTile<C.head_dim_v, kTile.m>;  // where Q was
  static constexpr int kSlotBytes = std::max(K::kBytes, V::kBytes);

  // Q until the last block of keys; then O on its way to memory, each warp in its own rows.
  alignas(kSmemAlignment) char q[std::max(Q::kBytes, O::kBytes)];
  alignas(kSmemAlignment) char ring[kTile.stages][kSlotBytes];
  CtaTile tile;
};

}  // namespace flash::sm80
