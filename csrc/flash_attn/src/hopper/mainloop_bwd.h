// A warpgroup's way through the blocks of queries that see its 64 keys, whose dK and dV it has
// alone, from the last to the first (FlashAttention-2, arXiv:2307.08691, algorithm 2). Tensors by
// the paper's letters: s is shared memory, r registers.
#pragma once

#include "hopper/bwd_visits.h"

namespace flash::hopper {

template <BwdConfig C, int kPart>
class BwdMainloop : BwdVisits<C, kPart> {
  using Base = BwdVisits<C, kPart>;
  using typename Base::K;
  using typename Base::Q;
  using typename Base::QueryGradient;
  using typename Base::S;
  static constexpr KeyRows kRows{C.dtype, kWarpgroupRows, C.head_dim};
  using W = WarpTile<kRows>;
  using Scores = typename W::Scores;
  using Packed = typename W::Probabilities;

 public:
  using KeyGradient = typename W::Output;
  static constexpr int kColumns = C.head_dim;

  using Base::Base;
  using Base::meet;

  // All visits.
  FLASH_DEVICE void walk(KeyGradient& rdK, KeyGradient& rdV) {
    if (!this->begin()) return;
#pragma unroll 1
    while (!this->is_done()) {
      const uint32_t sQ = this->wait_q();
      Scores rS;
      const bool is_finite = this->begin_visit();
      issue_s(rS, sQ);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_keep_in_order(rS[0]);
      if (!is_finite) {
        visit<true, false>(rdK, rdV, rS);
        continue;
      }
      bool overlaps = this->is_next_full();
#pragma unroll 1
      while (overlaps) overlaps = visit<false, true>(rdK, rdV, rS);
      visit<false, false>(rdK, rdV, rS);
    }
  }

  // What this warpgroup has of dK and dV.
  FLASH_DEVICE static KeyPart key_part(int warpgroup) { return {warpgroup * kWarpgroupRows, 0}; }

 private:
  // The warp's first key, of the CTA's.
  FLASH_DEVICE int warp_key() const {
    return this->warpgroup() * kWarpgroupRows + this->warp() * 16;
  }
  // dS^T of 64 of the block's queries, from `row` on.
  FLASH_DEVICE uint32_t slopes_of(int row) const {
    static_assert(S::kGroupCols == kWarpgroupRows);
    return ptx::shared_address(this->smem_.ds[this->odd()]) + row / S::kGroupCols * S::kGroupBytes;
  }

  // Issues S of 64 queries from `queries` on.
  FLASH_DEVICE void issue_s(Scores& rS, uint32_t queries) const {
    this->issue_scores(rS, this->k() + first_row(), queries);
  }
  // Of this warpgroup's keys in a tile.
  FLASH_DEVICE uint32_t first_row() const {
    return this->warpgroup() * kWarpgroupRows * K::kRowBytes;
  }

  // S is there; where kOverlaps, so is the next visit's at the end. Returns whether that one may
  // overlap, too. kByElement: products over the pairs that see each other alone.
  template <bool kByElement, bool kOverlaps>
  FLASH_DEVICE bool visit(KeyGradient& rdK, KeyGradient& rdV, Scores& rS) {
    this->wait_dout();
    static_for<C.m() / kWarpgroupRows>(
        [&](auto part) { multiply_part<kByElement>(rdK, rdV, rS, part * kWarpgroupRows); });
    ptx::fence_proxy_async();
    this->meet();
    const uint32_t slopes = slopes_of(dq_part<C>(this->warpgroup()).row);
    if constexpr (kByElement) {
      this->end_by_element(slopes);
      return false;
    }
    QueryGradient rdQ;
    this->issue_dq(rdQ, slopes);
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_keep_in_order(rdV[0]);
    ptx::wgmma_keep_in_order(rdK[0]);
    this->leave_dout();
    const BwdVisit last = this->leave_q();
    if constexpr (kOverlaps) issue_s(rS, this->next_q());
    ptx::wgmma_wait_group<kOverlaps>();
    ptx::wgmma_keep_in_order(rdQ[0]);
    this->end_visit(rdQ, last);
    if constexpr (!kOverlaps) return false;
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_keep_in_order(rS[0]);
    return this->is_next_full();
  }

  // Of 64 queries, from `row` of the block on: from scores to what they add to dV and dK, which is
  // left under way, and dS^T in shared memory.
  template <bool kByElement>
  FLASH_DEVICE void multiply_part(KeyGradient& rdK, KeyGradient& rdV, Scores& rS, int row) {
    const uint32_t sQ = this->q() + row * Q::kRowBytes;
    const uint32_t sdO = this->dout() + row * Q::kRowBytes;
    const ScorePart<C> part = this->part(warp_key(), row);
    Scores rdP;
    if (row > 0) issue_s(rS, sQ);
    this->issue_scores(rdP, this->v() + first_row(), sdO);
    if (row > 0) {
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_keep_in_order(rS[0]);
    }
    weigh(rS, part, this->launch_.scale_log2);
    Packed rP, rdS;
    pack_scores<C.dtype>(rP, rS);
    if constexpr (!kByElement) issue_gradient(rdV, rP, sdO);
    ptx::wgmma_wait_group<kByElement ? 0 : 1>();
    ptx::wgmma_keep_in_order(rdP[0]);
    slopes(rdP, rS, part);
    pack_scores<C.dtype>(rdS, rdP);
    store_scores<S>(slopes_of(row), warp_key(), 0, rdS);
    if constexpr (!kByElement) return issue_gradient(rdK, rdS, sQ);
    const QueriesOfKeys mask{this->here_.mask};
    const int first_key = this->here_.first_key + warp_key();
    gemm_pv_by_keys<kRows, Q>(rdV, rP, sdO, mask, first_key, part.query());
    gemm_pv_by_keys<kRows, Q>(rdK, rdS, sQ, mask, first_key, part.query());
  }

  // Issues r += scores * queries.
  FLASH_DEVICE static void issue_gradient(KeyGradient& r, const Packed& scores, uint32_t queries) {
    const ptx::WgmmaMatrix b = ptx::wgmma_matrix<Q::kRowBytes>(queries, Q::kGroupBytes);
    ptx::wgmma_keep_in_order(r[0]);
    ptx::wgmma_fence();
    static_for<kWarpgroupRows / 16>([&](auto i) {
      const uint32_t rA[4] = {scores[0][2 * i][0], scores[0][2 * i][1], scores[0][2 * i + 1][0],
                              scores[0][2 * i + 1][1]};
      ptx::wgmma_rs<C.dtype>(r[0], rA, b + i * 16 * Q::kRowBytes);
    });
    ptx::wgmma_commit_group();
  }
};

}  // namespace flash::hopper
