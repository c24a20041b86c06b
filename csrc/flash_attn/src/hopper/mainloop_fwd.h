// A warpgroup's way through the blocks of keys that its queries see, from the last to the first
// (FlashAttention-2, arXiv:2307.08691, algorithm 1; FlashAttention-3, arXiv:2407.08608, for what
// runs beside what). Tensors by the papers' letters: s is shared memory, r registers.
#pragma once

#include "base/ptx/tma.h"
#include "base/ptx/wgmma.h"
#include "common/block_range.h"
#include "hopper/fwd_params.h"
#include "hopper/mask.h"
#include "hopper/named_barrier.h"
#include "hopper/pipeline.h"
#include "hopper/smem.h"
#include "hopper/softmax.h"
#include "warp/contain.h"
#include "warp/rotary.h"
#include "warp/score.h"

namespace flash::hopper {

// Where a warpgroup's rows of a tile are. It lies in shared memory and is read again where it is
// needed: registers are short.
template <FwdConfig C>
class Place {
 public:
  FLASH_DEVICE Place(const FwdParams& p, const WorkTile& tile, int warpgroup)
      : p_(p), tile_(tile), warpgroup_(warpgroup) {}

  FLASH_DEVICE const Sequence& sequence() const { return tile_.sequence; }
  FLASH_DEVICE int batch() const { return tile_.place.batch; }
  FLASH_DEVICE int head() const { return tile_.head; }
  FLASH_DEVICE Mask mask() const { return mask_of(p_, tile_.sequence); }

  // First queries: of the CTA, of this warpgroup, of this warp.
  FLASH_DEVICE int cta_row() const { return tile_.place.m_block * C.m(); }
  FLASH_DEVICE int row() const { return cta_row() + warpgroup_ * kWarpgroupRows; }
  FLASH_DEVICE int warp_row() const { return row() + ptx::read_tid_x() / 32 % 4 * 16; }

  // The blocks of keys that they see.
  FLASH_DEVICE BlockRange cta_blocks() const {
    return block_range(mask(), cta_row(), cta_row() + C.m() - 1, C.n());
  }
  FLASH_DEVICE BlockRange blocks() const {
    return block_range(mask(), row(), row() + kWarpgroupRows - 1, C.n());
  }

 private:
  const FwdParams& p_;
  const WorkTile& tile_;
  int warpgroup_;
};

template <FwdConfig C>
class Mainloop {
 public:
  using W = WarpTile<C>;

  FLASH_DEVICE Mainloop(const FwdParams& p, const FwdLaunch& launch, SmemPlan<C>& smem,
                        int warpgroup)
      : p_(p), launch_(launch), smem_(smem), turns_(warpgroup), warpgroup_(warpgroup) {}

  // rO and the states of rows of all blocks of a tile, of which there are some. Q's slot is left to
  // release_q.
  FLASH_DEVICE void attend(typename W::Output& rO, Softmax<C>& softmax, const Place<C>& here) {
    const BlockRange cta = here.cta_blocks(), mine = here.blocks();
    int block = cta.end - 1;
    for (; block >= max(mine.end, cta.begin); --block) skip();
    if (mine.begin < mine.end) block = attend_mine(rO, softmax, here, mine, block);
    for (; block >= cta.begin; --block) skip();
  }

  // Waits for Q, and rotates this warpgroup's rows where that is asked for.
  FLASH_DEVICE void wait_q(const Place<C>& here) {
    wait_full(smem_.q_barriers, q_);
    if (p_.rotary_dim == 0) return;
    const Sequence& seq = here.sequence();
    const bool positions_differ = p_.window_left >= 0 || p_.window_right >= 0;
    rotate_q<C.dtype, typename Plan::Q, kWarpgroupThreads>(
        p_, q_rows(), min(kWarpgroupRows, seq.seqlen_q - here.row()),
        ptx::read_tid_x() % kWarpgroupThreads,
        [&](int row) { return seq.cached + (positions_differ ? here.row() + row : 0); });
    ptx::fence_proxy_async();
    warpgroup_barrier(warpgroup_);
  }
  FLASH_DEVICE void release_q() {
    leave(smem_.q_barriers, q_);
    q_.advance();
  }

 private:
  using Plan = SmemPlan<C>;
  using Scores = typename W::Scores;
  using Output = typename W::Output;
  using Probabilities = typename W::Probabilities;
  static constexpr Tile kTile = C.tile();
  using Position = RingPosition<kTile.stages>;
  static constexpr bool kPingPong = kTile.overlap == Overlap::kPingPong;

  // The blocks that this warpgroup sees, from `block` down; returns the one before them. Those that
  // every query sees, [full_begin, full_end), go without a mask, and overlap if scores are plain:
  // where they are modified, products are the smaller part, and a second copy of the code large.
  FLASH_DEVICE int attend_mine(Output& rO, Softmax<C>& softmax, const Place<C>& here,
                               const BlockRange& mine, int block) {
    const int full_end = min(mine.full_end, mine.end);
    const int full_begin = max(mine.full_begin, mine.begin);
    if constexpr (C.scores == ScoreClass::kModified) {
#pragma unroll 1
      for (; block >= mine.begin; --block)
        step(rO, softmax, here, block, block < full_begin || block >= full_end);
      return block;
    } else {
      int stop = full_begin < full_end ? full_end : mine.begin;
#pragma unroll 1
      for (;;) {  // blocks behind the full ones, these, blocks before them
#pragma unroll 1
        for (; block >= stop; --block) step(rO, softmax, here, block, true);
        if (stop == mine.begin) return block;
        steps_full(rO, softmax, here, block, full_begin);
        block = full_begin - 1;
        stop = mine.begin;
      }
    }
  }

  // This warpgroup's first row of Q.
  FLASH_DEVICE uint32_t q_rows() const {
    return ptx::shared_address(smem_.q[q_.slot()]) +
           warpgroup_ * kWarpgroupRows * Plan::Q::kRowBytes;
  }

  // Issues rS = sQ sK^T of the block in the slots `at`.
  FLASH_DEVICE void issue_qk(Scores& rS, const Position& at) {
    using Q = typename Plan::Q;
    using K = typename Plan::K;
    const ptx::WgmmaMatrix q = ptx::wgmma_matrix<Q::kRowBytes>(q_rows());
    const ptx::WgmmaMatrix k =
        ptx::wgmma_matrix<K::kRowBytes>(ptx::shared_address(smem_.k[at.slot()]));
    wait_full(smem_.k_barriers, at);
    ptx::wgmma_keep_in_order(rS[0]);
    ptx::wgmma_fence();
    static_for<C.head_dim / 16>([&](auto i) {
      constexpr int kSteps = Q::kGroupCols / 16;  // of a group of columns
      constexpr int kWithin = i % kSteps * 32;
      ptx::wgmma_ss<C.dtype>(rS[0], q + (i / kSteps * Q::kGroupBytes + kWithin),
                             k + (i / kSteps * K::kGroupBytes + kWithin), i > 0);
    });
    ptx::wgmma_commit_group();
  }

  // Issues rO += rP sV, whose block has come.
  FLASH_DEVICE void issue_pv(Output& rO, const Probabilities& rP) {
    using V = typename Plan::V;
    const ptx::WgmmaMatrix v = ptx::wgmma_matrix<V::kRowBytes>(
        ptx::shared_address(smem_.v[block_.slot()]), V::kGroupBytes);
    ptx::wgmma_keep_in_order(rO[0]);
    ptx::wgmma_fence();
    static_for<C.n() / 16>([&](auto i) {
      const uint32_t rA[4] = {rP[0][2 * i][0], rP[0][2 * i][1], rP[0][2 * i + 1][0],
                              rP[0][2 * i + 1][1]};
      ptx::wgmma_rs<C.dtype>(rO[0], rA, v + i * 16 * V::kRowBytes);
    });
    ptx::wgmma_commit_group();
  }

  template <int kTiles>
  FLASH_DEVICE void finish(float (&r)[kTiles][4]) {
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_keep_in_order(r);
  }

  // The block is done.
  FLASH_DEVICE void release_v() {
    leave<C.cluster()>(smem_.v_barriers, block_);
    block_.advance();
  }

  // A block that only other warpgroups see.
  FLASH_DEVICE void skip() {
    turns_.wait();
    turns_.pass();
    wait_full(smem_.k_barriers, block_);
    leave<C.cluster()>(smem_.k_barriers, block_);
    wait_full(smem_.v_barriers, block_);
    release_v();
  }

  // From products to unnormalised probabilities. rO goes along with the references.
  // `kMayHide`: some may be hidden, and are if `hides`. `kBesidePv`: P V is under way, which ends
  // before rO is touched.
  template <bool kMayHide, bool kBesidePv>
  FLASH_DEVICE void weigh(Scores& rS, Output& rO, Softmax<C>& softmax, const Place<C>& here,
                          int block, bool hides) {
    const int first_key = block * C.n();
    if (launch_.negate_q) {
#pragma unroll
      for (int n = 0; n < W::kS; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) rS[0][n][i] = -rS[0][n][i];
    }
    if constexpr (C.scores == ScoreClass::kModified) {
      if (launch_.modifies_scores)
        modify_scores<C>(rS, p_, {here.batch(), here.head(), here.warp_row(), here.mask()},
                         first_key);
    }
    if constexpr (kMayHide) {
      if (hides) hide_scores<C>(rS, here.mask(), here.warp_row(), first_key);
    }
    softmax.raise_references(rS, launch_.scale_log2, [&](const float(&factors)[2]) {
      if constexpr (kBesidePv) finish(rO[0]);
      multiply_rows<C>(rO, factors);
    });
    if constexpr (kPingPong) turns_.wait();
    softmax.template exponentials<!kMayHide>(rS, launch_.scale_log2);
    if constexpr (kPingPong) turns_.pass();
  }

  FLASH_DEVICE void probabilities(Probabilities& rP, const Scores& rS, const Place<C>& here,
                                  int block) {
    pack<C>(rP, rS);
    if constexpr (C.scores == ScoreClass::kModified) {
      if (launch_.dropout.enabled)
        drop<C>(rP, launch_.dropout,
                static_cast<uint32_t>(here.batch() * launch_.heads + here.head()), here.warp_row(),
                block * C.n());
    }
  }

  // S of a block with nothing beside it, and its probabilities.
  template <bool kMayHide>
  FLASH_DEVICE void scores_alone(Probabilities& rP, Output& rO, Softmax<C>& softmax,
                                 const Place<C>& here, int block, bool hides) {
    Scores rS;
    if constexpr (!kPingPong) turns_.wait();
    issue_qk(rS, block_);
    if constexpr (!kPingPong) turns_.pass();
    finish(rS[0]);
    leave<C.cluster()>(smem_.k_barriers, block_);
    weigh<kMayHide, false>(rS, rO, softmax, here, block, hides);
    probabilities(rP, rS, here, block);
  }

  // One block. `hides`: a mask or the end of the keys cuts it.
  FLASH_DEVICE void step(Output& rO, Softmax<C>& softmax, const Place<C>& here, int block,
                         bool hides) {
    Probabilities rP;
    scores_alone<true>(rP, rO, softmax, here, block, hides);
    wait_full(smem_.v_barriers, block_);
    if (launch_.inspects_v && hides && !is_v_finite()) {
      gemm_pv_by_keys<C, typename Plan::V>(rO, rP, ptx::shared_address(smem_.v[block_.slot()]),
                                           here.mask(), here.warp_row(), block * C.n());
    } else {
      issue_pv(rO, rP);
      finish(rO[0]);
    }
    __syncwarp();  // lanes have read its flags, or the slot
    release_v();
  }

  // Of the slot that is next; waits until it has been looked through, which all blocks are that are
  // cut for a part of the CTA's queries.
  FLASH_DEVICE bool is_v_finite() const {
    const int slot = block_.slot();
    ptx::mbarrier_wait(ptx::shared_address(&smem_.inspected[slot]), block_.phase());
    return ptx::load_shared(ptx::shared_address(smem_.not_finite[slot])) == 0;
  }

  // Blocks from `block` down to `last`, all of which every query sees.
  FLASH_DEVICE void steps_full(Output& rO, Softmax<C>& softmax, const Place<C>& here, int block,
                               int last) {
    Probabilities rP;
    scores_alone<false>(rP, rO, softmax, here, block, false);
    for (--block; block >= last; --block) {
      Scores rS;
      if constexpr (kPingPong) {
        wait_full(smem_.v_barriers, block_);
        issue_pv(rO, rP);
        issue_qk(rS, block_.next());
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_keep_in_order(rO[0]);
        release_v();
        finish(rS[0]);
        leave<C.cluster()>(smem_.k_barriers, block_);
        weigh<false, false>(rS, rO, softmax, here, block, false);
      } else {
        turns_.wait();
        issue_qk(rS, block_.next());
        wait_full(smem_.v_barriers, block_);
        issue_pv(rO, rP);
        turns_.pass();
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_keep_in_order(rS[0]);
        leave<C.cluster()>(smem_.k_barriers, block_.next());
        weigh<false, true>(rS, rO, softmax, here, block, false);
        finish(rO[0]);
        release_v();
      }
      probabilities(rP, rS, here, block);
    }
    wait_full(smem_.v_barriers, block_);
    issue_pv(rO, rP);
    finish(rO[0]);
    release_v();
  }

  const FwdParams& p_;
  const FwdLaunch& launch_;
  SmemPlan<C>& smem_;
  RingPosition<kTile.q_stages> q_;
  Position block_;  // whose V is next
  Turns<C> turns_;
  int warpgroup_;
};

}  // namespace flash::hopper
