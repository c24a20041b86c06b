// A warpgroup's way through the blocks of keys that its queries see, from the last to the first
// (FlashAttention-2, arXiv:2307.08691, algorithm 1; FlashAttention-3, arXiv:2407.08608, for what
// runs beside what). Tensors by the papers' letters: s is shared memory, r registers.
#pragma once

#include "base/ptx/tma.h"
#include "base/ptx/wgmma.h"
#include "common/block_range.h"
#include "hopper/contain_8_bits.h"
#include "hopper/fwd_params.h"
#include "hopper/gemm_pv_8_bits.h"
#include "hopper/mask.h"
#include "hopper/named_barrier.h"
#include "hopper/pipeline.h"
#include "hopper/place.h"
#include "hopper/smem.h"
#include "hopper/softmax.h"
#include "warp/contain.h"
#include "warp/rotary.h"
#include "warp/score.h"

namespace flash::hopper {

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
    if constexpr (!C.is_fp8()) {
      if (p_.rotary_dim != 0) rotate(here);
    }
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
  static constexpr bool kPingPong = kTile.overlap != Overlap::kWithin;
  static constexpr int kSteps = Plan::Q::kRowBytes / 32;  // of a wgmma, in a group of columns

  FLASH_DEVICE void rotate(const Place<C>& here) {
    const Sequence& seq = here.sequence();
    const bool positions_differ = p_.window_left >= 0 || p_.window_right >= 0;
    rotate_q<C.dtype, typename Plan::Q, kWarpgroupThreads>(
        p_, q_rows(), min(kWarpgroupRows, seq.seqlen_q - here.row()),
        ptx::read_tid_x() % kWarpgroupThreads,
        [&](int row) { return seq.cached + (positions_differ ? here.row() + row : 0); });
    ptx::fence_proxy_async();
    warpgroup_barrier(warpgroup_);
  }

  // The blocks that this warpgroup sees, from `block` down; returns the one before them. Those that
  // every query sees, [full_begin, full_end), go without a mask, and overlap if scores are plain:
  // where they are modified, products are the smaller part, and a second copy of the code large.
  // Nor do products that are apart.
  FLASH_DEVICE int attend_mine(Output& rO, Softmax<C>& softmax, const Place<C>& here,
                               const BlockRange& mine, int block) {
    const int full_end = min(mine.full_end, mine.end);
    const int full_begin = max(mine.full_begin, mine.begin);
    if constexpr (C.scores == ScoreClass::kModified || kTile.overlap == Overlap::kApart) {
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
    static_for<Q::kGroups * kSteps>([&](auto i) {
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

  // rO += rP sV of a block that has come, with nothing beside it.
  FLASH_DEVICE void gemm_pv(Output& rO, const Probabilities& rP) {
    if constexpr (C.is_fp8()) {
      static_for<C.head_dim_v / kTile.pv_columns>([&](auto part) {
        BlockOutput<C> rT;
        issue_pv_8_bits<C>(rT, rP, smem_.v[block_.slot()], part);
        finish(rT);
        const float factor = smem_.v_factors[block_.slot()];
        promote<C>(rO, rT, {factor, factor}, part);
      });
    } else {
      issue_pv(rO, rP);
      finish(rO[0]);
    }
  }

  template <int kTiles>
  FLASH_DEVICE void finish(float (&r)[kTiles][4]) {
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_keep_in_order(r);
  }

  // Until V of the block has come, and has been transposed.
  FLASH_DEVICE void wait_v() {
    if constexpr (C.is_fp8()) {
      wait_inspected();
    } else {
      wait_full(smem_.v_barriers, block_);
    }
  }
  FLASH_DEVICE void wait_inspected() const {
    ptx::mbarrier_wait(ptx::shared_address(&smem_.inspected[block_.slot()]), block_.phase());
  }

  // S of the block in the slots `at` is there.
  FLASH_DEVICE void release_k(Scores& rS, const Position& at) {
    if constexpr (C.is_fp8()) {
      if (p_.k_descale.block_stride != 0) {
        multiply_scores<C>(rS, smem_.k_factors[at.slot()]);
        __syncwarp();  // lanes have read it
      }
    }
    leave<C.cluster()>(smem_.k_barriers, at);
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
  // before rO is touched, or is what `raised` will be multiplied with.
  template <bool kMayHide, bool kBesidePv>
  FLASH_DEVICE void weigh(Scores& rS, Output& rO, Softmax<C>& softmax, const Place<C>& here,
                          int block, bool hides, float* raised = nullptr) {
    const int first_key = block * C.n();
    if (here.negates_q(launch_)) {
#pragma unroll
      for (int n = 0; n < W::kS; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) rS[0][n][i] = -rS[0][n][i];
    }
    if constexpr (C.scores == ScoreClass::kModified) {
      if (launch_.modifies_scores) {
        if constexpr (C.is_fp8()) multiply_scores<C>(rS, here.factor());
        modify_scores<C>(rS, p_, {here.batch(), here.head(), here.warp_row(), here.mask()},
                         first_key);
      }
    }
    if constexpr (kMayHide) {
      if (hides) hide_scores<C>(rS, here.mask(), here.warp_row(), first_key);
    }
    const float scale_log2 = here.scale_log2(launch_);
    softmax.raise_references(rS, scale_log2, [&](const float(&factors)[2]) {
      if constexpr (kBesidePv && C.is_fp8()) {
        raised[0] *= factors[0], raised[1] *= factors[1];
      } else if constexpr (kBesidePv) {
        finish(rO[0]);
      }
      multiply_rows<C>(rO, factors);
    });
    if constexpr (kPingPong) turns_.wait();
    softmax.template exponentials<!kMayHide>(rS, scale_log2);
    if constexpr (kTile.overlap == Overlap::kPingPong && C.is_fp8()) {
      turns_.pass_behind(softmax.rows[0][0].sum, softmax.rows[0][1].sum);
    } else if constexpr (kPingPong) {
      turns_.pass();
    }
  }

  FLASH_DEVICE void probabilities(Probabilities& rP, const Scores& rS, const Place<C>& here,
                                  int block) {
    if constexpr (C.is_fp8()) {
      pack_in_8_bits<C>(rP, rS);
    } else {
      pack<C>(rP, rS);
    }
    if constexpr (C.scores == ScoreClass::kModified && !C.is_fp8()) {
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
    release_k(rS, block_);
    weigh<kMayHide, false>(rS, rO, softmax, here, block, hides);
    probabilities(rP, rS, here, block);
  }

  // One block. `hides`: a mask or the end of the keys cuts it.
  FLASH_DEVICE void step(Output& rO, Softmax<C>& softmax, const Place<C>& here, int block,
                         bool hides) {
    Probabilities rP;
    scores_alone<true>(rP, rO, softmax, here, block, hides);
    wait_v();
    if (launch_.inspects_v && hides && !is_v_finite()) {
      const uint32_t sV = ptx::shared_address(smem_.v[block_.slot()]);
      if constexpr (C.is_fp8()) {
        gemm_pv_in_8_bits_by_keys<C, typename Plan::Vt>(rO, rP, sV, smem_.v_factors[block_.slot()],
                                                        here.mask(), here.warp_row(),
                                                        block * C.n());
      } else {
        gemm_pv_by_keys<C, typename Plan::V>(rO, rP, sV, here.mask(), here.warp_row(),
                                             block * C.n());
      }
    } else {
      gemm_pv(rO, rP);
    }
    __syncwarp();  // lanes have read its flags, or the slot
    release_v();
  }

  // Of the slot that is next; waits until it has been looked through, which all blocks are that are
  // cut for a part of the CTA's queries.
  FLASH_DEVICE bool is_v_finite() const {
    wait_inspected();
    return ptx::load_shared(ptx::shared_address(smem_.not_finite[block_.slot()])) == 0;
  }

  // Issues rS = sQ sK^T of the next block behind rO += rP sV of this one, which ends here.
  FLASH_DEVICE void issue_pv_beside_qk(Output& rO, const Probabilities& rP, Scores& rS) {
    if constexpr (C.is_fp8()) {
      BlockOutput<C> rT;
      issue_pv_8_bits<C>(rT, rP, smem_.v[block_.slot()], 0);
      issue_qk(rS, block_.next());
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_keep_in_order(rT);
      const float factor = smem_.v_factors[block_.slot()];
      promote<C>(rO, rT, {factor, factor}, 0);
      __syncwarp();  // lanes have read the factor
    } else {
      issue_pv(rO, rP);
      issue_qk(rS, block_.next());
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_keep_in_order(rO[0]);
    }
  }

  // The softmax of rS, the next block, whose Q K^T is under way, beside rO += rP sV of this one.
  FLASH_DEVICE void weigh_beside_pv(Scores& rS, Output& rO, const Probabilities& rP,
                                    Softmax<C>& softmax, const Place<C>& here, int block) {
    const auto wait_qk = [&] {
      turns_.pass();
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_keep_in_order(rS[0]);
      release_k(rS, block_.next());
    };
    if constexpr (C.is_fp8()) {
      BlockOutput<C> rT;
      issue_pv_8_bits<C>(rT, rP, smem_.v[block_.slot()], 0);
      wait_qk();
      const float factor = smem_.v_factors[block_.slot()];
      float factors[2] = {factor, factor};
      weigh<false, true>(rS, rO, softmax, here, block, false, factors);
      finish(rT);
      promote<C>(rO, rT, factors, 0);
      __syncwarp();  // lanes have read the factor
    } else {
      issue_pv(rO, rP);
      wait_qk();
      weigh<false, true>(rS, rO, softmax, here, block, false);
      finish(rO[0]);
    }
  }

  // Blocks from `block` down to `last`, all of which every query sees.
  FLASH_DEVICE void steps_full(Output& rO, Softmax<C>& softmax, const Place<C>& here, int block,
                               int last) {
    Probabilities rP;
    scores_alone<false>(rP, rO, softmax, here, block, false);
    for (--block; block >= last; --block) {
      Scores rS;
      if constexpr (kPingPong) {
        wait_v();
        issue_pv_beside_qk(rO, rP, rS);
        release_v();
        finish(rS[0]);
        release_k(rS, block_);
        weigh<false, false>(rS, rO, softmax, here, block, false);
      } else {
        turns_.wait();
        issue_qk(rS, block_.next());
        wait_v();
        weigh_beside_pv(rS, rO, rP, softmax, here, block);
        release_v();
      }
      probabilities(rP, rS, here, block);
    }
    wait_v();
    gemm_pv(rO, rP);
    if constexpr (C.is_fp8()) __syncwarp();
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
