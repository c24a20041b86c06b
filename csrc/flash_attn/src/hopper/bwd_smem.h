// What lies where in the shared memory of a CTA of the backward.
#pragma once

#include "hopper/bwd_tile_size.h"
#include "hopper/smem.h"
#include "warp/key_tile.h"

namespace flash::hopper {

// A visit to a block of queries, on its way from the producer to those that multiply.
struct BwdVisit {
  QueryBlock queries;
  Turn turn;
  bool is_full;  // every query sees every key, and none lies behind the end
  bool has_far;  // some rows are far from 0
};

template <BwdConfig C>
struct BwdSmemPlan {
  static constexpr BwdTile kTile = C.tile();
  using Q = SmemTile<C.head_dim, kTile.m>;  // and dO
  using K = SmemTile<C.head_dim, kTile.n>;  // and V; then dK and dV on their way to memory
  using S = SmemTile<kTile.m, kTile.n>;     // dS^T and P^T, keys x queries

  alignas(kTileAlignment) char k[K::kBytes], v[K::kBytes];
  alignas(kTileAlignment) char q[kTile.q_stages][Q::kBytes], dout[kTile.dout_stages][Q::kBytes];
  // Of a visit and the one before: dS^T, and P^T where it is not in registers.
  alignas(kTileAlignment) char ds[2][S::kBytes], p[2][kTile.keys_apart() ? 16 : S::kBytes];
  alignas(kTileAlignment) float dq[kBwdWarpgroups][kWarpgroupRows * kStagedColumns];
  // x = (score - far_score) scale + reference are logarithms of weights, to base 2. far_score is
  // not 0 for rows that are far from 0 (common/far_rows.h), whose x are 0 at most; it is not there
  // in visits without any.
  alignas(8) float reference[kTile.q_stages][kTile.m];
  alignas(8) float far_score[kTile.q_stages][kTile.m];
  alignas(8) float delta[kTile.dout_stages][kTile.m];
  RingBarriers<kTile.q_stages> q_barriers;
  RingBarriers<kTile.dout_stages> dout_barriers;
  RingBarriers<1> dq_barriers[kBwdWarpgroups];
  uint64_t k_full, v_full;
  BwdVisit visits[kTile.q_stages];  // of q's slots
  KeyTile tile;
  // What warps that multiply note down for themselves.
  struct Notes {
    int visits;            // that it has been to
    int staged;            // parts of dQ that it has handed on
    bool keys_not_finite;  // some of K, where it matters
  } notes[4 * kBwdWarpgroups];
};

}  // namespace flash::hopper
