// What lies where in a CTA's shared memory.
#pragma once

#include <algorithm>

#include "common/seqlen.h"
#include "hopper/tile_size.h"
#include "warp/packed_tiles.h"
#include "warp/smem_tile.h"

namespace flash::hopper {

// Of a tile: TMA's permutation of chunks is one of address bits 4 to 9.
inline constexpr int kTileAlignment = 1024;

// The mbarriers of a ring of slots: `full` completes a phase when a slot has been filled, `empty`
// when all have left it.
template <int kSlots>
struct RingBarriers {
  uint64_t full[kSlots], empty[kSlots];
};

// A tile of queries on its way from the producer to all others.
struct WorkTile {
  PackedTile place;
  Sequence sequence;
  int head;
  bool is_last;  // not a tile: there are no more
  // As AttentionLaunch has them, of e4m3, whose factors go into them; where scores are modified,
  // those are `factor`.
  float scale, scale_log2;
  bool negate_q;
  float factor;
};

inline constexpr int kTileSlots = 2;
inline constexpr int kInspectors = 3;  // warps of the producer's warpgroup that look through V

template <FwdConfig C>
struct SmemPlan {
  static constexpr Tile kTile = C.tile();
  static constexpr int kBytes = dtype_bytes(C.dtype);  // of an element
  using Q = SmemTile<C.head_dim, kTile.m(), kBytes>;
  using K = SmemTile<C.head_dim, kTile.n, kBytes>;
  using V = SmemTile<C.head_dim_v, kTile.n, kBytes>;
  // Of e4m3: V in the same place, transposed. Keys are columns.
  using Vt = SmemTile<kTile.n, C.head_dim_v, kBytes, V::kGroupCols>;
  using O = SmemTile<C.head_dim_v, kTile.m()>;

  alignas(kTileAlignment) char q[kTile.q_stages][Q::kBytes];
  alignas(kTileAlignment) char k[kTile.stages][K::kBytes];
  alignas(kTileAlignment) char v[kTile.stages][V::kBytes];
  alignas(kTileAlignment) char o[kTile.o_apart ? O::kBytes : 16];
  RingBarriers<kTile.q_stages> q_barriers;
  RingBarriers<kTile.stages> k_barriers, v_barriers;
  RingBarriers<kTileSlots> tile_barriers;
  uint64_t inspected[kTile.stages];  // a slot of V has been looked through, and transposed
  WorkTile tiles[kTileSlots];
  alignas(4) uint8_t not_finite[kTile.stages][4];  // by inspector: what it has seen of a slot of V
  float k_factors[kTile.stages], v_factors[kTile.stages];  // of e4m3, of the slots' blocks
};

}  // namespace flash::hopper
