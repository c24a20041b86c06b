// A warpgroup of the backward on its way: what all that multiply do at a visit beside products.
#pragma once

#include "base/ptx/tma.h"
#include "base/ptx/wgmma.h"
#include "hopper/bwd_scores.h"
#include "hopper/epilogue_bwd.h"
#include "hopper/load_bwd.h"
#include "hopper/named_barrier.h"
#include "warp/contain.h"

namespace flash::hopper {

// `kPart`: of which warpgroup the shape of dQ is.
template <BwdConfig C, int kPart>
class BwdVisits {
 public:
  using Plan = BwdSmemPlan<C>;
  using Q = typename Plan::Q;
  using K = typename Plan::K;
  using S = typename Plan::S;
  static constexpr DqPart kDq = dq_part<C>(kPart);
  using QPosition = RingPosition<Plan::kTile.q_stages>;
  using DoutPosition = RingPosition<Plan::kTile.dout_stages>;
  using QueryGradient = float[1][kDq.columns / 8][4];
  static constexpr int kRounds = kDq.columns / staged_columns(kDq.columns);
  static constexpr int kTiles = kDq.columns / 8 / kRounds;  // of a round: columns in eights

  FLASH_DEVICE BwdVisits(const BwdParams& p, const BwdLaunch& launch, Plan& smem, int warpgroup)
      : p_(p), launch_(launch), smem_(smem), here_(smem.tile), warpgroup_(warpgroup) {}

  // Waits for K and V; false if there are no visits.
  FLASH_DEVICE bool begin() {
    if (lane() == 0) notes() = {};
    __syncwarp();
    if (is_done()) return false;
    ptx::mbarrier_wait(ptx::shared_address(&smem_.k_full), 0);
    ptx::mbarrier_wait(ptx::shared_address(&smem_.v_full), 0);
    look_through_keys();
    return true;
  }
  FLASH_DEVICE bool is_done() const { return uniform(rest() == 0); }
  FLASH_DEVICE bool has_next() const { return uniform(rest() > 1); }

  // Waits for this visit's Q, and returns it.
  FLASH_DEVICE uint32_t wait_q() {
    wait_full(smem_.q_barriers, q_position());
    return q();
  }
  // Whether this visit and the next one, whose Q has come then, are of full blocks.
  FLASH_DEVICE bool is_next_full() {
    if (!has_next()) return false;
    const QPosition next(visit_ + 1);
    wait_full(smem_.q_barriers, next);
    return uniform(visit().is_full && smem_.visits[next.slot()].is_full);
  }
  FLASH_DEVICE uint32_t next_q() const {
    return ptx::shared_address(smem_.q[QPosition(ptx::opaque(visit_) + 1).slot()]);
  }

  FLASH_DEVICE void wait_dout() { wait_full(smem_.dout_barriers, dout_position()); }

  // Of a visit whose Q has come. Where a mask or an end cuts the block, whether they
  // and K hold neither inf nor NaN: 0 times that must not reach a gradient across a hidden pair.
  // Elsewhere true.
  FLASH_DEVICE bool begin_visit() {
    if (uniform(visit().is_full)) return true;
    wait_dout();
    const int rows = here_.seq.seqlen_q - visit().queries.block * C.m();
    const bool is_q_finite = look_through<Q>(smem_.q[q_position().slot()], rows);
    const bool is_finite = look_through<Q>(smem_.dout[dout_position().slot()], rows) &&
                           is_q_finite && !notes().keys_not_finite;
    return !uniform(ptx::bar_sync_or(barrier(), kConsumers, !is_finite));
  }

  // Lanes have read dO, or what they have waited for has.
  FLASH_DEVICE void leave_dout() {
    __syncwarp();
    leave(smem_.dout_barriers, dout_position());
  }
  // The same of Q. Returns what its slot has told.
  FLASH_DEVICE BwdVisit leave_q() {
    const BwdVisit last = visit();
    __syncwarp();
    leave(smem_.q_barriers, q_position());
    return last;
  }

  FLASH_DEVICE void end_visit(const QueryGradient& rdQ, const BwdVisit& last) {
    static_for<kRounds>([&](auto round) { give_dq<round * kTiles>(rdQ, round, last); });
    visit_ = ptx::opaque(visit_ + 1);
  }

  // The same of a visit that goes by elements; `slopes`: dS^T of its queries.
  FLASH_DEVICE void end_by_element(uint32_t slopes) {
    static_for<kRounds>([&](auto round) {
      float rdQ[1][kTiles][4];
      dq_by_element(rdQ, round, slopes);
      give_dq<0>(rdQ, round, visit());
    });
    leave_dout();
    leave_q();
    visit_ = ptx::opaque(visit_ + 1);
  }

  // Of both warpgroups.
  FLASH_DEVICE void meet() const { ptx::bar_sync(barrier(), kConsumers); }

 protected:
  FLASH_DEVICE int rest() const { return here_.visits.count() * launch_.group - visit_; }
  static constexpr int kConsumers = kBwdWarpgroups * kWarpgroupThreads;

  // Where a loop shall not keep what is computed from it: registers are short.
  FLASH_DEVICE int warpgroup() const { return ptx::opaque(warpgroup_); }
  FLASH_DEVICE static int lane() { return ptx::read_tid_x() % 32; }
  FLASH_DEVICE static int warp() { return ptx::read_tid_x() / 32 % 4; }

  FLASH_DEVICE const BwdVisit& visit() const { return smem_.visits[q_position().slot()]; }
  FLASH_DEVICE uint32_t q() const { return ptx::shared_address(smem_.q[q_position().slot()]); }
  FLASH_DEVICE uint32_t dout() const {
    return ptx::shared_address(smem_.dout[dout_position().slot()]);
  }
  FLASH_DEVICE uint32_t k() const { return ptx::shared_address(smem_.k); }
  FLASH_DEVICE uint32_t v() const { return ptx::shared_address(smem_.v); }
  // Which of two visits in a row.
  FLASH_DEVICE int odd() const { return visit_ % 2; }
  FLASH_DEVICE ScorePart<C> part(int key, int row) const {
    return {smem_, q_position().slot(), dout_position().slot(), key, row};
  }

  // Issues r = A B^T over the head dim, of 64 rows of a tile of keys and some of a tile of queries.
  template <int kTiles>
  FLASH_DEVICE static void issue_scores(float (&r)[1][kTiles][4], uint32_t keys, uint32_t queries) {
    const ptx::WgmmaMatrix a = ptx::wgmma_matrix<K::kRowBytes>(keys);
    const ptx::WgmmaMatrix b = ptx::wgmma_matrix<Q::kRowBytes>(queries);
    ptx::wgmma_keep_in_order(r[0]);
    ptx::wgmma_fence();
    static_for<C.head_dim / 16>([&](auto i) {
      constexpr int kSteps = Q::kGroupCols / 16;  // of a group of columns
      constexpr int kWithin = i % kSteps * 32;
      ptx::wgmma_ss<C.dtype>(r[0], a + (i / kSteps * K::kGroupBytes + kWithin),
                             b + (i / kSteps * Q::kGroupBytes + kWithin), i > 0);
    });
    ptx::wgmma_commit_group();
  }

  // Issues rdQ = sdS sK, of this warpgroup's part; `slopes`: dS^T of its queries.
  FLASH_DEVICE void issue_dq(QueryGradient& r, uint32_t slopes) const {
    const ptx::WgmmaMatrix a = ptx::wgmma_matrix<S::kRowBytes>(slopes);
    const ptx::WgmmaMatrix b = ptx::wgmma_matrix<K::kRowBytes>(own_columns<K>(k()), K::kGroupBytes);
    ptx::wgmma_keep_in_order(r[0]);
    ptx::wgmma_fence();
    static_for<C.n() / 16>([&](auto i) {
      ptx::wgmma_ss<C.dtype, true, true>(r[0], a + i * 16 * S::kRowBytes, b + i * 16 * K::kRowBytes,
                                         i > 0);
    });
    ptx::wgmma_commit_group();
  }

  // From which of a tile's groups of columns on dQ's part is.
  template <class Smem>
  FLASH_DEVICE uint32_t own_columns(uint32_t tile) const {
    return tile + dq_part<C>(warpgroup()).column / Smem::kGroupCols * Smem::kGroupBytes;
  }

  // Whether a query of the block sees a key of the CTA's. Read again each time: registers are
  // short.
  FLASH_DEVICE bool sees(int row, int key) const {
    const int query = visit().queries.block * C.m() + row;
    const KeyRange seen = here_.mask.keys(query);
    key += static_cast<int>(ptx::load_shared(ptx::shared_address(&here_.first_key)));
    return query < here_.mask.seqlen_q && seen.begin <= key && key < seen.end;
  }

  const BwdParams& p_;
  const BwdLaunch& launch_;
  Plan& smem_;
  const KeyTile& here_;
  int warpgroup_;

 private:
  // Hands columns of this warpgroup's part of the block's dQ on to be added, tiles kFirst.. of
  // rdQ; the last of the block's visitors writes dq instead.
  template <int kFirst, int kN>
  FLASH_DEVICE void give_dq(const float (&rdQ)[1][kN][4], int round, const BwdVisit& last) {
    if (uniform(last.turn.is_last())) {
      finish_dq<C, kFirst, kTiles>(rdQ, p_, launch_, here_, last, warpgroup_, round);
      return;
    }
    const uint32_t first =
        ptx::shared_address(smem_.dq[warpgroup_]) + (warp() * kTiles * 32 + lane()) * kChunkBytes;
    const RingPosition<1> position(notes().staged);
    wait_empty(smem_.dq_barriers[warpgroup_], position);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      ptx::store_shared(first + n * 32 * kChunkBytes, rdQ[0][kFirst + n]);
    ptx::fence_proxy_async();
    __syncwarp();
    arrive_as_warp(full(smem_.dq_barriers[warpgroup_], position));
    if (lane() == 0) ++notes().staged;
    __syncwarp();
  }

  // A round of dQ over the pairs of queries and keys that see each other alone.
  FLASH_DEVICE void dq_by_element(float (&r)[1][kTiles][4], int round, uint32_t slopes) const {
    const DqPart part = dq_part<C>(warpgroup_);
    const ptx::Element first = ptx::accumulator_element(lane(), 0);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) r[0][n][i] = 0.f;
    multiply_by_element<C.dtype>(
        r, C.n(), [&](int i) { return warp() * 16 + i * 8 + first.row; },
        [&](int row, int key) { return sees(part.row + row, key); },
        [&](int row, int key) { return element_address<S>(slopes, key, row); },
        [&](int key, int n) {
          return element_address<K>(own_columns<K>(k()), key,
                                    round * kStagedColumns + n * 8 + first.col);
        });
  }

  FLASH_DEVICE QPosition q_position() const { return QPosition(visit_); }
  FLASH_DEVICE DoutPosition dout_position() const { return DoutPosition(visit_); }

  FLASH_DEVICE static int barrier() { return static_cast<int>(NamedBarrier::kTurn); }

  // Rows of a tile from `rows` on become 0: they are another sequence's. Whether those before hold
  // neither inf nor NaN, as far as this thread's share of them tells.
  template <class Smem>
  FLASH_DEVICE static bool look_through(char* tile, int rows) {
    constexpr int kRows = Smem::kGroupBytes / Smem::kRowBytes;
    const uint32_t shared = ptx::shared_address(tile);
    uint32_t sum = 0;  // of zeros, or NaN
#pragma unroll 2
    for (int i = ptx::read_tid_x() - kWarpgroupThreads; i < kRows * Smem::kChunks;
         i += kConsumers) {
      const bool exists = i / Smem::kChunks < rows;
#pragma unroll
      for (int g = 0; g < Smem::kGroups; ++g) {
        const uint32_t address = shared + g * Smem::kGroupBytes + i * kChunkBytes;
        if (!exists) {
          ptx::store_shared(address, uint4{0, 0, 0, 0});
          continue;
        }
        const uint4 x = ptx::load_shared_16_bytes(address);
        for (const uint32_t pair : {x.x, x.y, x.z, x.w}) sum = ptx::fma2<C.dtype>(pair, 0, sum);
      }
    }
    ptx::fence_proxy_async();
    return (sum & 0x7fff7fffu) == 0;
  }

  // Once, where some visits are cut.
  FLASH_DEVICE void look_through_keys() {
    const bool is_cut = here_.keys < C.n() || here_.mask.left >= 0 || here_.mask.right >= 0 ||
                        here_.seq.seqlen_q % C.m() != 0;
    if (!is_cut) return;
    const bool is_finite = look_through<K>(smem_.k, here_.keys);
    const bool not_finite = ptx::bar_sync_or(barrier(), kConsumers, !is_finite);
    if (lane() == 0) notes().keys_not_finite = not_finite;
    __syncwarp();
  }
  FLASH_DEVICE typename Plan::Notes& notes() const {
    return smem_.notes[ptx::read_tid_x() / 32 - 4];
  }

  int visit_ = 0;
};

}  // namespace flash::hopper
