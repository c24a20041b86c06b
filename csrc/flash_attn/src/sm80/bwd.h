// Attention, backward, for compute capability 8.0 and newer: cp.async, ldmatrix, mma.sync.
//
// FlashAttention-2 (arXiv:2307.08691), algorithm 2. With P = exp(scale S - lse) recomputed and
// delta = rowsum(dO * O) - dlse, which bwd_prepare.h has left in softmax_d (and what is subtracted
// in the place of an lse that is far from 0 in the workspace: far_rows.h):
//
//   S = Q K^T, dP = dO V^T, dS = P * (dP - delta)
//   dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K
//
// A CTA owns n keys of one key-value head (bwd_table.h) and walks over the blocks of m queries that
// see any of them, from the last down, each for all query heads of its group: dK and dV of the keys
// stay in registers and have one owner. Scores are computed once; P and dS pass through shared
// memory as 16 bits, since the three products after them are shared out otherwise among the warps:
// every operand of a product is read by ldmatrix, and a warp's tile is the largest that registers
// allow.
//
// dQ of a block of queries is summed over the CTAs whose keys it sees, in fp32 and in a fixed order
// (common/bwd_schedule.h): a warp waits until the others before it have added, adds, and tells the
// next; the last writes dq. The result depends on no schedule. A warp's sums lie in memory as its
// lanes hold them.
//
// Memory traffic of a CTA: K, V, dK and dV once, Q and dO of a block at each visit, and its dQ's
// sums there and back.
#pragma once

#include "base/ptx/atomic.h"
#include "sm80/bwd_gemm.h"
#include "sm80/bwd_scores.h"
#include "warp/find_key_tile.h"
#include "warp/store_gradients.h"
#include "warp/store_rows.h"

namespace flash::sm80 {

template <BwdConfig C>
FLASH_DEVICE BwdSchedule schedule_of(const Mask& mask) {
  return {mask, C.tile().m, C.tile().n};
}

template <BwdConfig C>
FLASH_DEVICE void find_tile(KeyTile& tile, const BwdParams& p, const BwdLaunch& launch) {
  if (ptx::read_tid_x() < 32) find_key_tile<C.tile().m, C.tile().n>(tile, p, launch);
  __syncthreads();
}

template <BwdConfig C>
FLASH_DEVICE void store_dq(const typename BwdWarps<C>::QueryGradient& rdQ, const BwdParams& p,
                           const BwdLaunch& launch, const KeyTile& here,
                           const QueryBlock& queries) {
  using Warps = BwdWarps<C>;
  const int warp = this_warp<C>();
  static_for<Warps::kRows / 8>([&](auto i) {
    const ptx::Element first = ptx::accumulator_element(this_lane<C>(), 2 * (i % 2));
    const int row = queries.block * C.tile().m + Warps::row(warp, i / 2) + first.row;
    if (row >= here.seq.seqlen_q) return;
    char* dq = operand_row(p.dq, C.dtype, here.seq.batch, here.seq.q_row + row, queries.head);
#pragma unroll
    for (int n = 0; n < C.head_dim / Warps::kQColumnWarps / 8; ++n) {
      const int column = Warps::q_column(warp, n) + first.col;
      const float* x = &rdQ[i / 2][n][2 * (i % 2)];
      store_pair(dq + column * kElementBytes,
                 ptx::pack<C.dtype>(x[0] * p.scale_softmax, x[1] * p.scale_softmax),
                 static_cast<int>(p.d) - column, launch.dq_aligned);
    }
  });
}

// Adds the warp's part of dS K to the block's dQ when it is its turn.
template <BwdConfig C>
FLASH_DEVICE void add_dq(typename BwdWarps<C>::QueryGradient& rdQ, const BwdParams& p,
                         const BwdLaunch& launch, const KeyTile& here, const QueryBlock& queries,
                         const Turn& turn) {
  constexpr int kWarps = C.tile().warps;
  constexpr int kM = sizeof(rdQ) / sizeof(rdQ[0]), kN = sizeof(rdQ[0]) / sizeof(rdQ[0][0]);
  const int64_t index =
      (here.first_q_block + int64_t{queries.head} * launch.q_blocks + queries.block) * kWarps +
      this_warp<C>();
  float4* sums =
      reinterpret_cast<float4*>(launch.dq_sums) + index * (kM * kN * 32) + this_lane<C>();
  if (turn.before > 0) {
    if (this_lane<C>() == 0)
      while (ptx::load_acquire(launch.turns + index) != static_cast<uint32_t>(turn.before)) {
      }
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float4 x = sums[(m * kN + n) * 32];
        rdQ[m][n][0] += x.x;
        rdQ[m][n][1] += x.y;
        rdQ[m][n][2] += x.z;
        rdQ[m][n][3] += x.w;
      }
  }
  if (turn.is_last()) return store_dq<C>(rdQ, p, launch, here, queries);
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
      sums[(m * kN + n) * 32] = float4{rdQ[m][n][0], rdQ[m][n][1], rdQ[m][n][2], rdQ[m][n][3]};
  __syncwarp();
  if (this_lane<C>() == 0)
    ptx::store_release(launch.turns + index, static_cast<uint32_t>(turn.before + 1));
  __syncwarp();
}

// Brings the gradient of this CTA's keys, or values, to shared memory.
template <BwdConfig C>
FLASH_DEVICE void stage_gradient(uint32_t tile, const typename BwdWarps<C>::KeyGradient& r,
                                 float scale, int warp, int lane) {
  using Warps = BwdWarps<C>;
  using K = typename BwdSmemPlan<C>::K;
  static_for<C.tile().n / Warps::kKeyWarps / 8>([&](auto i) {
    const ptx::Element first = ptx::accumulator_element(lane, 2 * (i % 2));
    const int row = Warps::key(warp, i / 2) + first.row;
#pragma unroll
    for (int n = 0; n < C.head_dim / Warps::kKvColumnWarps / 8; ++n) {
      const float* x = &r[i / 2][n][2 * (i % 2)];
      ptx::store_shared(element_address<K>(tile, row, Warps::kv_column(warp, n) + first.col),
                        ptx::pack<C.dtype>(x[0] * scale, x[1] * scale));
    }
  });
}

// Writes dK and dV, through shared memory where K and V were.
template <BwdConfig C>
FLASH_DEVICE void epilogue(uint32_t smem, const typename BwdWarps<C>::KeyGradient& rdK,
                           const typename BwdWarps<C>::KeyGradient& rdV, const BwdParams& p,
                           const BwdLaunch& launch, const KeyTile& here) {
  using Plan = BwdSmemPlan<C>;
  const uint32_t sdK = smem + offsetof(Plan, k), sdV = smem + offsetof(Plan, v);
  __syncthreads();
  stage_gradient<C>(sdK, rdK, p.scale_softmax, this_warp<C>(), this_lane<C>());
  stage_gradient<C>(sdV, rdV, C.scores == ScoreClass::kModified ? launch.dropout.rescale : 1.f,
                    this_warp<C>(), this_lane<C>());
  __syncthreads();
  const auto store = [&](uint32_t tile, const Operand& x, bool aligned, int64_t head_dim) {
    store_rows<typename Plan::K, C.threads()>(
        tile,
        operand_row(x, C.dtype, here.seq.k_batch, here.seq.k_row + here.first_key, here.head_k),
        x.row_stride * kElementBytes, aligned, here.keys, static_cast<int>(head_dim),
        ptx::read_tid_x());
  };
  store(sdK, p.dk, launch.dk_aligned, p.d);
  store(sdV, p.dv, launch.dv_aligned, p.d_v);
}

// Whether every query of a block sees every key of this CTA, and none lies beyond the sequence.
template <BwdConfig C>
FLASH_DEVICE bool is_full_block(const KeyTile& here, const QueryBlock& queries) {
  return schedule_of<C>(here.mask).key_blocks(queries.block).is_full(here.key_block) &&
         (queries.block + 1) * C.tile().m <= here.seq.seqlen_q;
}

template <BwdConfig C>
FLASH_DEVICE void mha_bwd(const BwdParams& p, const BwdLaunch& launch) {
  using Plan = BwdSmemPlan<C>;
  using Stage = typename Plan::Stage;
  using Warps = BwdWarps<C>;
  constexpr bool kIsDouble = C.tile().stages == 2;
  extern __shared__ __align__(1024) char memory[];
  const uint32_t smem = ptx::shared_address(memory);

  KeyTile& here = reinterpret_cast<Plan*>(memory)->tile;
  find_tile<C>(here, p, launch);
  if (here.place.batch == p.b) return clear_rows_of_no_sequence<C.dtype, C.threads()>(p, here);
  if (here.keys <= 0) return;

  typename Warps::KeyGradient rdK, rdV;
  clear(rdK);
  clear(rdV);
  const int steps = here.visits.count();
  Visit visit{0, 0};
  uint32_t stage = smem + offsetof(Plan, stages);
  uint32_t other = kIsDouble ? stage + sizeof(Stage) : stage;
  if (steps > 0) {
    fetch_keys<C>(smem, p, launch, here);
    fetch<C>(stage, p, launch, here, query_block(launch, here, visit));
    ptx::cp_async_commit_group();
  }
  while (visit.step < steps) {
    const Visit next = visit.next(launch.group);
    const auto fetch_next = [&] {
      if (next.step < steps) fetch<C>(other, p, launch, here, query_block(launch, here, next));
      ptx::cp_async_commit_group();
    };
    ptx::cp_async_wait_group<0>();
    __syncthreads();
    if (kIsDouble) fetch_next();
    const QueryBlock queries = query_block(launch, here, visit);
    const bool is_full = is_full_block<C>(here, queries);
    recompute<C>(smem, stage, p, launch, here, queries, is_full);
    const bool by_element = is_cut_and_not_finite<C>(smem, stage, is_full);

    add_keys<C>(rdV, smem + offsetof(Plan, p), stage + offsetof(Stage, dout), here, queries,
                by_element);
    add_keys<C>(rdK, smem + offsetof(Plan, ds), stage + offsetof(Stage, q), here, queries,
                by_element);
    if (!kIsDouble) {
      __syncthreads();
      fetch_next();
    }
    const Turn turn = schedule_of<C>(here.mask).turn(here.key_block, queries.block);
    typename Warps::QueryGradient rdQ;
    multiply_queries<C>(rdQ, smem + offsetof(Plan, ds), smem + offsetof(Plan, k), here, queries,
                        by_element);
    add_dq<C>(rdQ, p, launch, here, queries, turn);
    visit = next;
    const uint32_t free = stage;
    stage = other;
    other = free;
  }
  epilogue<C>(smem, rdK, rdV, p, launch, here);
}

}  // namespace flash::sm80
