// What lies where in the shared memory of a CTA of the backward.
#pragma once

#include "sm80/bwd_table.h"
#include "sm80/smem.h"

namespace flash::sm80 {

// A CTA's block of keys: one warp finds it for all.
struct BwdCtaTile {
  PackedTile place;  // m_block: key block
  Sequence sequence;
  int first_q_block;  // in BwdLaunch's dq_sums and turns, of the sequence's head 0
};

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
  BwdCtaTile tile;
};

}  // namespace flash::sm80
