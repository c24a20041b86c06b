// What lies where in the shared memory of a CTA of the backward.
#pragma once

#include "sm80/bwd_table.h"
#include "warp/key_tile.h"
#include "warp/smem_tile.h"

namespace flash::sm80 {

template <BwdConfig C>
struct BwdSmemPlan {
  static constexpr BwdTile kTile = C.tile();
  using Q = SmemTile<C.head_dim, kTile.m>;  // and dO
  using K = SmemTile<C.head_dim, kTile.n>;  // and V; then dK and dV on their way to memory
  using P = SmemTile<kTile.n, kTile.m>;     // and dS

  // Of a block of queries.
  struct Stage {
    alignas(kSmemAlignment) char q[Q::kBytes], dout[Q::kBytes];
    float lse[kTile.m], delta[kTile.m];
  };
  alignas(kSmemAlignment) char k[K::kBytes], v[K::kBytes];
  alignas(kSmemAlignment) char p[P::kBytes], ds[P::kBytes];
  Stage stages[kTile.stages];
  KeyTile tile;
};

}  // namespace flash::sm80
