// The same where 64 keys' dK and dV are more than a warpgroup's registers: two warpgroups share
// them, by columns. Each computes the scores of half of a block's queries; P^T and dS^T go to
// shared memory, where both take them from.
#pragma once

#include "hopper/bwd_visits.h"

namespace flash::hopper {

template <BwdConfig C, int kPart>
class BwdWideMainloop : BwdVisits<C, kPart> {
  using Base = BwdVisits<C, kPart>;
  using typename Base::K;
  using typename Base::Q;
  using typename Base::QueryGradient;
  using typename Base::S;
  static constexpr int kQueries = kWarpgroupRows / kBwdWarpgroups;  // whose scores are its own
  static constexpr KeyRows kRows{C.dtype, kQueries, dq_part<C>(kPart).columns};
  using W = WarpTile<kRows>;
  using Scores = typename W::Scores;
  using Packed = typename W::Probabilities;

 public:
  using KeyGradient = typename W::Output;
  static constexpr int kColumns = dq_part<C>(kPart).columns;

  using Base::Base;
  using Base::meet;

  // All visits.
  FLASH_DEVICE void walk(KeyGradient& rdK, KeyGradient& rdV) {
    if (!this->begin()) return;
#pragma unroll 1
    while (!this->is_done()) {
      this->wait_q();
      const bool is_finite = this->begin_visit();
      this->wait_dout();
      multiply_scores();
      if (!is_finite) {
        add_by_element(rdV, weights(), this->dout());
        add_by_element(rdK, slopes_tile(), this->q());
        this->end_by_element(slopes_tile());
        continue;
      }
      QueryGradient rdQ;
      issue_gradient(rdV, weights(), this->dout());
      issue_gradient(rdK, slopes_tile(), this->q());
      this->issue_dq(rdQ, slopes_tile());
      ptx::wgmma_wait_group<2>();
      ptx::wgmma_keep_in_order(rdV[0]);
      this->leave_dout();
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_keep_in_order(rdK[0]);
      const BwdVisit last = this->leave_q();
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_keep_in_order(rdQ[0]);
      this->end_visit(rdQ, last);
    }
  }

  // What this warpgroup has of dK and dV.
  FLASH_DEVICE static KeyPart key_part(int warpgroup) { return {0, dq_part<C>(warpgroup).column}; }

 private:
  FLASH_DEVICE uint32_t weights() const { return ptx::shared_address(this->smem_.p[this->odd()]); }
  FLASH_DEVICE uint32_t slopes_tile() const {
    return ptx::shared_address(this->smem_.ds[this->odd()]);
  }

  // P^T and dS^T of this visit; all are there when both warpgroups have met.
  FLASH_DEVICE void multiply_scores() {
    const int row = this->warpgroup_ * kQueries, key = this->warp() * 16;
    const ScorePart<C> part = this->part(key, row);
    Scores rS, rdP;
    this->issue_scores(rS, this->k(), this->q() + row * Q::kRowBytes);
    this->issue_scores(rdP, this->v(), this->dout() + row * Q::kRowBytes);
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_keep_in_order(rS[0]);
    weigh(rS, part, this->launch_.scale_log2);
    Packed packed;
    pack_scores<C.dtype>(packed, rS);
    store_scores<S>(weights(), key, row / kChunkElements, packed);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_keep_in_order(rdP[0]);
    slopes(rdP, rS, part);
    pack_scores<C.dtype>(packed, rdP);
    store_scores<S>(slopes_tile(), key, row / kChunkElements, packed);
    ptx::fence_proxy_async();
    this->meet();
  }

  // Issues r += scores * queries, of this warpgroup's columns.
  FLASH_DEVICE void issue_gradient(KeyGradient& r, uint32_t scores, uint32_t queries) const {
    const ptx::WgmmaMatrix a = ptx::wgmma_matrix<S::kRowBytes>(scores);
    const ptx::WgmmaMatrix b =
        ptx::wgmma_matrix<Q::kRowBytes>(this->template own_columns<Q>(queries), Q::kGroupBytes);
    ptx::wgmma_keep_in_order(r[0]);
    ptx::wgmma_fence();
    static_for<C.m() / 16>([&](auto i) {
      ptx::wgmma_ss<C.dtype, false, true>(r[0], a + i * 32, b + i * 16 * Q::kRowBytes, true);
    });
    ptx::wgmma_commit_group();
  }

  // The same over the pairs that see each other alone.
  FLASH_DEVICE void add_by_element(KeyGradient& r, uint32_t scores, uint32_t queries) const {
    const uint32_t columns = this->template own_columns<Q>(queries);
    const ptx::Element first = ptx::accumulator_element(this->lane(), 0);
    multiply_by_element<C.dtype>(
        r, C.m(), [&](int i) { return this->warp() * 16 + i * 8 + first.row; },
        [&](int key, int row) { return this->sees(row, key); },
        [&](int key, int row) { return element_address<S>(scores, key, row); },
        [&](int row, int n) { return element_address<Q>(columns, row, n * 8 + first.col); });
  }
};

}  // namespace flash::hopper
