// The warpgroups' way through the blocks of a unit of keys (FlashAttention-2, arXiv:2307.08691,
// algorithm 1). Tensors by the paper's letters: s is shared memory, r registers.
#pragma once

#include "base/ptx/tma.h"
#include "base/ptx/wgmma.h"
#include "hopper/decode_load.h"
#include "hopper/decode_params.h"
#include "hopper/decode_share.h"
#include "hopper/decode_smem.h"
#include "hopper/inspect.h"
#include "hopper/mask.h"
#include "hopper/pipeline.h"
#include "hopper/softmax.h"
#include "warp/contain.h"
#include "warp/decode_place.h"
#include "warp/decode_score.h"

namespace flash::hopper {

// Hides the scores of keys that their row does not see. `first_row` and `first_key` are those of
// the warp's tile.
template <DecodeConfig C>
FLASH_DEVICE void hide_scores(typename WarpTile<C>::Scores& rS, const FoldedMask& mask,
                              int first_row, int first_key) {
  const int lane = ptx::read_tid_x() % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const ptx::Element first = ptx::accumulator_element(lane, 2 * half);
    const KeyRange keys = mask.keys(first_row + first.row);
    const int column = first_key + first.col;
    hide_columns<C>(rS, half, keys.begin - column, keys.end - column);
  }
}

template <DecodeConfig C>
class DecodeLoop {
 public:
  using W = WarpTile<C>;
  using Output = typename W::Output;

  FLASH_DEVICE DecodeLoop(const FwdParams& p, const DecodeLaunch& launch,
                          const DecodePlace<C>& here, const KeyUnits<C>& units, DecodeSmem<C>& smem,
                          int warp)
      : p_(p),
        launch_(launch),
        here_(here),
        units_(units),
        smem_(smem),
        warpgroup_(warp / 4),
        share_(smem.exchange, warp) {}

  // rO, which is 0, and the states of rows of a unit; the rows' sums are complete.
  FLASH_DEVICE void attend(Output& rO, Softmax<C>& softmax, int unit) {
#pragma unroll 1
    for (int block = unit * units_.blocks_of_unit; block < units_.end_block(unit); ++block)
      step(rO, softmax, units_.first_key + block * C.block_keys());
    float sums[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) sums[half] = quad_sum(softmax.rows[0][half].sum);
    share_.add(sums);
#pragma unroll
    for (int half = 0; half < 2; ++half) softmax.rows[0][half].sum = sums[half];
  }

 private:
  using Smem = DecodeSmem<C>;
  using Scores = typename W::Scores;
  using Probabilities = typename W::Probabilities;
  static constexpr DecodeTile kTile = C.tile();
  static constexpr int kSlots = kTile.warpgroups;  // of a block

  // A block of keys.
  FLASH_DEVICE void step(Output& rO, Softmax<C>& softmax, int key) {
    const BlockRange& seen = units_.seen;
    const bool is_full = seen.full_begin <= key && key + C.block_keys() <= seen.full_end;
    const bool multiplies_v = is_full || prepare_v(key);
    Scores rS;
    gemm_qk(rS);
    weigh(rS, rO, softmax, key + warpgroup_ * kTile.n, !is_full);
    Probabilities rP[kSlots];
    pack<C>(rP[0], rS);
    share_.gather(rP);
    // Warpgroups that share a block have waited for a slot each before they gave each other theirs.
    if constexpr (!kTile.v_within_k) await(smem_.v_barriers, block_);
    if (multiplies_v) {
      gemm_pv(rO, rP);
    } else {
#pragma unroll
      for (int i = 0; i < kSlots; ++i)
        gemm_pv_by_keys<C, typename Smem::V>(rO, rP[i], v_slot(block_.ahead(i)), here_.mask,
                                             here_.first_row + warp_row(), key + i * kTile.n);
      __syncwarp();
    }
    static_for<kSlots>([&](auto i) {
      leave(kTile.v_within_k ? smem_.k_barriers : smem_.v_barriers, block_.ahead(i));
    });
    block_ = block_.ahead(kSlots);
  }

  FLASH_DEVICE static int warp_row() { return ptx::read_tid_x() / 32 % 4 * 16; }

  // Waits for a slot. What the producer has copied row by row is of the generic proxy.
  FLASH_DEVICE void await(RingBarriers<kTile.stages>& barriers,
                          const RingPosition<kTile.stages>& at) const {
    wait_full(barriers, at);
    if (launch_.box_keys == 0) ptx::fence_proxy_async();
  }
  // x, the same in all lanes. Where pairs of warps meet at barriers the compiler does not see that
  // it is, and would bring each descriptor to uniform registers by itself.
  FLASH_DEVICE static uint32_t uniform(uint32_t x) {
    return kSlots > 1 ? __shfl_sync(0xffffffffu, x, 0) : x;
  }

  // This warpgroup's columns of V.
  FLASH_DEVICE uint32_t v_slot(const RingPosition<kTile.stages>& at) const {
    using V = typename Smem::V;
    if constexpr (!kTile.v_within_k) return ptx::shared_address(smem_.v) + at.slot() * V::kBytes;
    return ptx::shared_address(smem_.k[at.slot()]) +
           warpgroup_ * (V::kGroups / kSlots * V::kGroupBytes);
  }

  // rS = sQ sK^T of this warpgroup's slot.
  FLASH_DEVICE void gemm_qk(Scores& rS) {
    using Q = typename Smem::Q;
    using K = typename Smem::K;
    const auto at = block_.ahead(warpgroup_);
    const ptx::WgmmaMatrix q =
        ptx::wgmma_matrix<Q::kRowBytes>(uniform(ptx::shared_address(smem_.q)));
    const ptx::WgmmaMatrix k =
        ptx::wgmma_matrix<K::kRowBytes>(uniform(ptx::shared_address(smem_.k[at.slot()])));
    await(smem_.k_barriers, at);
    ptx::wgmma_keep_in_order(rS[0]);
    ptx::wgmma_fence();
    static_for<C.head_dim / 16>([&](auto i) {
      constexpr int kSteps = Q::kGroupCols / 16;  // of a group of columns
      constexpr int kWithin = i % kSteps * 32;
      ptx::wgmma_ss<C.dtype>(rS[0], q + (i / kSteps * Q::kGroupBytes + kWithin),
                             k + (i / kSteps * K::kGroupBytes + kWithin), i > 0);
    });
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_keep_in_order(rS[0]);
    if constexpr (!kTile.v_within_k) leave(smem_.k_barriers, at);
  }

  // rO += rP sV, whose slots have come.
  FLASH_DEVICE void gemm_pv(Output& rO, const Probabilities (&rP)[kSlots]) {
    using V = typename Smem::V;
    ptx::wgmma_keep_in_order(rO[0]);
    ptx::wgmma_fence();
    static_for<kSlots>([&](auto slot) {
      const ptx::WgmmaMatrix v =
          ptx::wgmma_matrix<V::kRowBytes>(uniform(v_slot(block_.ahead(slot))), V::kGroupBytes);
      static_for<kTile.n / 16>([&](auto i) {
        const auto& p = rP[slot][0];
        const uint32_t rA[4] = {p[2 * i][0], p[2 * i][1], p[2 * i + 1][0], p[2 * i + 1][1]};
        ptx::wgmma_rs<C.dtype>(rO[0], rA, v + i * 16 * V::kRowBytes);
      });
    });
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_keep_in_order(rO[0]);
  }

  // From products to unnormalised probabilities; rO goes along with the references. `first_key` is
  // that of rS.
  FLASH_DEVICE void weigh(Scores& rS, Output& rO, Softmax<C>& softmax, int first_key, bool hides) {
    if (launch_.modifies_scores) cap_and_slope<C>(rS, p_, here_, first_key, warp_row());
    if (hides) hide_scores<C>(rS, here_.mask, here_.first_row + warp_row(), first_key);
    float largest[2];
    softmax.row_maxima(rS, largest);
    share_.maximum(largest);
    softmax.raise_references(largest, launch_.scale_log2,
                             [&](const float(&factors)[2]) { multiply_rows<C>(rO, factors); });
    softmax.template exponentials<false>(rS, launch_.scale_log2);
  }

  // Of a block that a mask or the end of the keys cuts, before anything is multiplied: values
  // behind the last key become 0. Whether P V may be multiplied as a whole: 0 times NaN must not
  // reach the rows that do not see a key.
  FLASH_DEVICE bool prepare_v(int key) {
    using V = typename Smem::V;
    const int thread = ptx::read_tid_x(), seqlen_k = here_.seq.seqlen_k;
    const BlockRange& seen = units_.seen;
    const bool is_masked =
        key < seen.full_begin || min(key + C.block_keys(), seqlen_k) > seen.full_end;
    bool is_finite = true;
#pragma unroll 1
    for (int i = 0; i < kSlots; ++i) {
      const auto at = block_.ahead(i);
      wait_full(kTile.v_within_k ? smem_.k_barriers : smem_.v_barriers, at);
      const uint32_t slot = kTile.v_within_k ? ptx::shared_address(smem_.k[at.slot()]) : v_slot(at);
      const int rows = max(min(seqlen_k - key - i * kTile.n, kTile.n), 0);
      if (is_masked) is_finite &= is_finite_share<C.dtype, V, C.consumers()>(slot, rows, thread);
      clear_rows_behind<V, C.consumers()>(slot, rows, kTile.n, thread);
    }
    ptx::fence_proxy_async();
    uint8_t(&flags)[C.consumer_warps()] = smem_.not_finite[cut_blocks_++ % 2];
    if (thread % 32 == 0) flags[thread / 32] = !is_finite;
    consumer_barrier<C>();
    bool all = true;
#pragma unroll
    for (int w = 0; w < C.consumer_warps(); ++w) all &= flags[w] == 0;
    return all;
  }

  const FwdParams& p_;
  const DecodeLaunch& launch_;
  const DecodePlace<C>& here_;
  const KeyUnits<C>& units_;
  Smem& smem_;
  const int warpgroup_;
  const WarpgroupShare<C> share_;
  RingPosition<kTile.stages> block_;  // the first of its slots
  int cut_blocks_ = 0;
};

}  // namespace flash::hopper
