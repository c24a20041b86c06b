// Attention of few queries over many keys, forward, for compute capability 8.0 and newer.
//
// The query heads that share a key-value head are rows of one tile: row r is query r / group of
// head r % group. A CTA of 4 warps owns 16 such rows, the height of an mma, and some units of the
// sequence's keys (common/split_heuristic.h). Its warps share no key: each takes every fourth block
// of 16 or 32 keys, which it fetches itself into a ring of its own, with Q, scores and the output
// in registers, so no warp waits for another until a unit ends. Then the warps' outputs are summed
// in shared memory (merge_units.h) and merged into what the CTA has so far; where several CTAs
// share a tile, they go to the workspace instead, and the last CTA to arrive merges them all.
//
// What bounds it is memory: K and V are read once, from 108 SMs of an A100 at 10 to 13 bytes a
// cycle of each. 512 bytes of them, a warp's cp.async, take one ldmatrix, two mma of which group /
// 16 is of use, and the rest of a softmax; docs/cuda.md has the sum. Copies under way, three of
// four slots of a ring, are 48 KiB for a CTA and cover the latency.
#pragma once

#include "sm80/decode_load.h"
#include "sm80/decode_score.h"
#include "sm80/decode_tile.h"
#include "sm80/steps.h"
#include "warp/contain.h"
#include "warp/decode_query.h"

namespace flash::sm80 {

// Operand A of the first product, all of it or read as it is needed.
template <DecodeConfig C>
class QueryTile {
 public:
  FLASH_DEVICE QueryTile(uint32_t sQ, int lane) : sQ_(lane_address<Q>(sQ, ptx::a_chunk(lane))) {
    if constexpr (kInRegisters) static_for<C.head_dim / 16>([&](auto k) { read<k>(rQ_[k]); });
  }

  template <int kK>
  FLASH_DEVICE void get(uint32_t (&a)[4]) const {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = rQ_[kK][i];
    } else {
      read<kK>(a);
    }
  }

 private:
  using Q = typename SmemPlan<C>::Q;
  static constexpr bool kInRegisters = C.tile().q_in_registers;

  template <int kK>
  FLASH_DEVICE void read(uint32_t (&a)[4]) const {
    ptx::ldmatrix_x4<Q::ahead(kK)>(a, sQ_ ^ Q::flip(kK));
  }

  uint32_t sQ_;  // this lane's address
  uint32_t rQ_[kInRegisters ? C.head_dim / 16 : 1][4];
};

// rS = Q sK^T of the warp's keys. `sK` is this lane's address.
template <DecodeConfig C>
FLASH_DEVICE void gemm_qk(typename WarpTile<C>::Scores& rS, const QueryTile<C>& q, uint32_t sK) {
  using K = typename SmemPlan<C>::K;
#pragma unroll
  for (int n = 0; n < WarpTile<C>::kS; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) rS[0][n][i] = 0.f;
  static_for<C.head_dim / 16>([&](auto k) {
    uint32_t rQ[4];
    q.template get<k>(rQ);
    static_for<WarpTile<C>::kS / 2>([&](auto n) {
      uint32_t rK[4];
      ptx::ldmatrix_x4<n * 16 * K::kRowBytes + K::ahead(k)>(rK, sK ^ K::flip(k));
      ptx::mma_m16n8k16<C.dtype>(rS[0][2 * n], rQ, rK[0], rK[1]);
      ptx::mma_m16n8k16<C.dtype>(rS[0][2 * n + 1], rQ, rK[2], rK[3]);
    });
  });
}

// What a warp's steps need to know beside its keys.
template <DecodeConfig C>
struct DecodeSteps {
  const FwdParams& p;
  const DecodeLaunch& launch;
  const DecodePlace<C>& here;
  const BlockRange& seen;
  int lane;

  FLASH_DEVICE bool is_full(int key) const {
    return seen.full_begin <= key && key + C.tile().n <= seen.full_end;
  }

  // A step over a block of K: its probabilities rP, and rO to the new maxima.
  FLASH_DEVICE void attend(typename WarpTile<C>::Probabilities& rP,
                           typename WarpTile<C>::Output& rO, typename WarpTile<C>::Rows& rows,
                           const QueryTile<C>& q, uint32_t sK, int key) const {
    typename WarpTile<C>::Scores rS;
    float rescale[1][2];
    gemm_qk<C>(rS, q, lane_address<typename SmemPlan<C>::K>(sK, ptx::b_chunk_n_major(lane)));
    if (launch.modifies_scores) modify_scores<C>(rS, p, here, key);
    if (!is_full(key)) apply_mask<C>(rS, here.mask, here.first_row, key);
    softmax_step<C>(rP, rescale, rS, rows, launch.scale_log2);
    rescale_o<C>(rO, rescale);
  }

  // A step over a block of V.
  FLASH_DEVICE void accumulate(typename WarpTile<C>::Output& rO,
                               const typename WarpTile<C>::Probabilities& rP, uint32_t sV,
                               int key) const {
    using V = typename SmemPlan<C>::V;
    if (!is_full(key) && !is_finite<C>(sV)) {
      gemm_pv_by_keys<C, V>(rO, rP, sV, here.mask, here.first_row, key);
    } else {
      gemm_pv<C>(rO, rP, lane_address<V>(sV, ptx::b_chunk_k_major(lane)));
    }
  }
};

template <DecodeConfig C>
FLASH_DEVICE KeyRows key_rows(const DecodePlace<C>& here, const Operand& x, int64_t head_dim,
                              bool aligned) {
  return {here.first_key_row(x), x.row_stride * kElementBytes, x.batch_stride * kElementBytes,
          static_cast<int>(head_dim), aligned};
}

// Where this warp's keys and values are.
template <DecodeConfig C>
FLASH_DEVICE typename WarpBlocks<C>::Source key_source(const FwdParams& p,
                                                       const DecodeLaunch& launch,
                                                       const DecodePlace<C>& here,
                                                       const KeyUnits<C>& units, int warp) {
  return {key_rows<C>(here, p.k, p.d, launch.k_aligned),
          key_rows<C>(here, p.v, p.d_v, launch.v_aligned),
          {here.seq.pages, static_cast<int>(p.k_entries), here.seq.leftpad, launch.page_size},
          here.seq.seqlen_k,
          units.first_key + warp * C.tile().n,
          units.seen.begin,
          units.seen.end};
}

// This CTA's units: merged into `total` if it has the tile for itself, else kept in the workspace.
template <DecodeConfig C>
FLASH_DEVICE void attend_units(Total<C>& total, const FwdParams& p, const DecodeLaunch& launch,
                               const DecodePlace<C>& here, const KeyUnits<C>& units,
                               SmemPlan<C>& plan) {
  const int lane = ptx::read_tid_x() % 32;
  const int warp = __shfl_sync(0xffffffffu, ptx::read_tid_x() / 32, 0);  // known to be uniform
  const uint32_t sQ = ptx::shared_address(&plan) + SmemPlan<C>::q_offset();
  load_q<C, typename SmemPlan<C>::Q>(p, launch, here, sQ);
  WarpBlocks<C> keys(key_source<C>(p, launch, here, units, warp),
                     ptx::shared_address(plan.ring[warp]), lane,
                     units.mine.begin * units.blocks_of_unit, units.end_block(units.mine.end - 1));
  ptx::cp_async_wait_group<C.tile().stages - 1>();
  __syncthreads();
  prepare_q<C, typename SmemPlan<C>::Q>(p, launch, here, sQ, [] { __syncthreads(); });
  const QueryTile<C> q(sQ, lane);
  const DecodeSteps<C> steps{p, launch, here, units.seen, lane};
  const WarpSum<C> sum_warps(plan, warp, lane);
  for (int unit = units.mine.begin; unit < units.mine.end; ++unit) {
    typename WarpTile<C>::Output rO = {};
    typename WarpTile<C>::Rows rows;
    clear_rows<C>(rows);
    for (int block = unit * units.blocks_of_unit; block < units.end_block(unit); ++block) {
      typename WarpTile<C>::Probabilities rP;
      const int key = keys.key(block);
      const uint32_t sK = keys.next_k(block);
      if (keys.is_seen(block)) steps.attend(rP, rO, rows, q, sK, key);
      const uint32_t sV = keys.next_v(block);
      if (keys.is_seen(block)) steps.accumulate(rO, rP, sV, key);
    }
    sum_warps(rO, rows, launch.scale_log2);
    const Unit result{plan.states, plan.output[0], SmemPlan<C>::kOutputStride};
    if (units.mine.sharers == 1) {
      total.take(result, here.rows, launch.scale_log2);
    } else {
      store_unit<C>(kept_unit<C>(launch, here.tile, unit), result, here.rows);
    }
  }
}

template <DecodeConfig C>
FLASH_DEVICE void mha_decode(const FwdParams& p, const DecodeLaunch& launch) {
  extern __shared__ __align__(1024) char smem[];
  auto& plan = *reinterpret_cast<SmemPlan<C>*>(smem);
  decode_tile<C>(p, launch, plan,
                 [&](Total<C>& total, const DecodePlace<C>& here, const KeyUnits<C>& units) {
                   attend_units<C>(total, p, launch, here, units, plan);
                 });
}

}  // namespace flash::sm80
