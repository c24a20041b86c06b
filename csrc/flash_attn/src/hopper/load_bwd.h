// The warps of the backward that multiply nothing: one brings tiles into shared memory, one for
// each warpgroup that multiplies takes its part of dQ to memory.
#pragma once

#include "base/ptx/atomic.h"
#include "base/ptx/tma.h"
#include "hopper/bwd_params.h"
#include "hopper/bwd_smem.h"
#include "hopper/pipeline.h"
#include "warp/attention_launch.h"

namespace flash::hopper {

template <BwdConfig C>
FLASH_DEVICE BwdSchedule schedule_of(const Mask& mask) {
  return {mask, C.m(), C.n()};
}

// Calls f(queries) for a CTA's visits, in their order.
template <class F>
FLASH_DEVICE void for_each_visit(const BwdTiles& launch, const KeyTile& here, const F& f) {
  const int steps = here.visits.count();
  for (Visit visit{0, 0}; visit.step < steps; visit = visit.next(launch.group))
    f(query_block(launch, here, visit));
}

// The producer warp's copies.
template <BwdConfig C>
class BwdLoader {
 public:
  FLASH_DEVICE BwdLoader(const BwdParams& p, const BwdLaunch& launch, BwdSmemPlan<C>& smem)
      : p_(p), launch_(launch), smem_(smem), here_(smem.tile) {}

  FLASH_DEVICE void load_k() { load_keys(smem_.k, launch_.k, smem_.k_full); }
  FLASH_DEVICE void load_v() { load_keys(smem_.v, launch_.v, smem_.v_full); }

  // Q and what is subtracted from its rows' scores.
  FLASH_DEVICE void load_q(const QueryBlock& queries) {
    const int slot = q_.slot();
    wait_empty(smem_.q_barriers, q_);
    load_queries(smem_.q[slot], launch_.q, full(smem_.q_barriers, q_), queries);
    const float* lse = p_.softmax_lse + seq().batch * p_.lse_batch_stride +
                       queries.head * p_.lse_head_stride + seq().lse_row;
    bool has_far = false;
    for_each_row(queries, [&](int row, int query) {
      const float x = query < seq().seqlen_q ? lse[query] : 0.f;
      has_far |= fabsf(x) > kFarLse;
      smem_.reference[slot][row] = -x * kLog2e;
    });
    has_far = __any_sync(0xffffffffu, has_far);
    if (has_far) load_far(queries, lse);
    const BwdSchedule schedule = schedule_of<C>(here_.mask);
    if (lane() == 0) {
      const bool is_full = schedule.key_blocks(queries.block).is_full(here_.key_block) &&
                           (queries.block + 1) * C.m() <= seq().seqlen_q;
      smem_.visits[slot] = {queries, schedule.turn(here_.key_block, queries.block), is_full,
                            has_far};
    }
    announce(full(smem_.q_barriers, q_));
    q_.advance();
  }

  // dO and delta.
  FLASH_DEVICE void load_dout(const QueryBlock& queries) {
    const int slot = dout_.slot();
    wait_empty(smem_.dout_barriers, dout_);
    load_queries(smem_.dout[slot], launch_.dout, full(smem_.dout_barriers, dout_), queries);
    const int64_t first =
        p_.cu_seqlens_q == nullptr ? 0 : seq().lse_row + 128 * int64_t{seq().batch};
    const float* delta = p_.dsoftmax_sum + seq().batch * p_.dsoftmax_batch_stride +
                         queries.head * p_.dsoftmax_head_stride + first;
    for_each_row(queries, [&](int row, int query) {
      smem_.delta[slot][row] = query < seq().seqlen_q ? delta[query] : 0.f;
    });
    announce(full(smem_.dout_barriers, dout_));
    dout_.advance();
  }

 private:
  using Plan = BwdSmemPlan<C>;

  FLASH_DEVICE static int lane() { return ptx::read_tid_x() % 32; }
  FLASH_DEVICE const Sequence& seq() const { return here_.seq; }

  // f(row, query) of this lane's rows of a block.
  template <class F>
  FLASH_DEVICE void for_each_row(const QueryBlock& queries, const F& f) const {
#pragma unroll
    for (int i = 0; i < C.m(); i += 32) f(i + lane(), queries.block * C.m() + i + lane());
  }

  // What takes the place of lse where it is far from 0.
  FLASH_DEVICE void load_far(const QueryBlock& queries, const float* lse) const {
    const int slot = q_.slot();
    for_each_row(queries, [&](int row, int query) {
      float score = 0.f;
      if (query < seq().seqlen_q && fabsf(lse[query]) > kFarLse) {
        const RowReference far = launch_.references.at(seq(), queries.head, query);
        score = far.score;
        smem_.reference[slot][row] = -far.log_sum * kLog2e;
      }
      smem_.far_score[slot][row] = score;
    });
  }

  // The groups of columns of a tile, one lane for each.
  template <class Smem>
  FLASH_DEVICE void load_groups(char* tile, const CUtensorMap& map, uint32_t barrier,
                                ptx::BoxPlace at) const {
    if (lane() >= Smem::kGroups) return;
    at.column = lane() * Smem::kGroupCols;
    ptx::tma_load(ptx::shared_address(tile) + lane() * Smem::kGroupBytes, map, at, barrier);
  }

  FLASH_DEVICE void load_keys(char* tile, const CUtensorMap& map, uint64_t& barrier) const {
    const uint32_t full = ptx::shared_address(&barrier);
    if (lane() == 0) ptx::mbarrier_arrive_expect_tx(full, Plan::K::kBytes);
    load_groups<typename Plan::K>(tile, map, full,
                                  {0, static_cast<int>(seq().k_row) + here_.first_key, here_.head_k,
                                   static_cast<int>(seq().k_batch)});
  }

  FLASH_DEVICE void load_queries(char* tile, const CUtensorMap& map, uint32_t barrier,
                                 const QueryBlock& queries) const {
    load_groups<typename Plan::Q>(tile, map, barrier,
                                  {0, static_cast<int>(seq().q_row) + queries.block * C.m(),
                                   queries.head, launch_.is_packed ? 0 : seq().batch});
  }

  // What the lanes have written is there; bytes may have come before they are announced.
  FLASH_DEVICE void announce(uint32_t barrier) const {
    __syncwarp();
    if (lane() == 0) ptx::mbarrier_arrive_expect_tx(barrier, Plan::Q::kBytes);
  }

  const BwdParams& p_;
  const BwdLaunch& launch_;
  BwdSmemPlan<C>& smem_;
  const KeyTile& here_;
  RingPosition<Plan::kTile.q_stages> q_;
  RingPosition<Plan::kTile.dout_stages> dout_;
};

// The producer warp. What the first products need comes first.
template <BwdConfig C>
FLASH_DEVICE void produce(const BwdParams& p, const BwdLaunch& launch, BwdSmemPlan<C>& smem) {
  BwdLoader<C> loader(p, launch, smem);
  bool is_first = true;
  for_each_visit(launch, smem.tile, [&](const QueryBlock& queries) {
    if (is_first) loader.load_k();
    loader.load_q(queries);
    if (is_first) loader.load_v();
    loader.load_dout(queries);
    is_first = false;
  });
}

// Where a warpgroup's part of a block's dQ is summed up, and how many have added to it.
template <BwdConfig C>
struct DqSums {
  float* sums;
  uint32_t* turns;

  FLASH_DEVICE DqSums(const BwdTiles& launch, const KeyTile& here, const QueryBlock& queries,
                      int warpgroup) {
    const int64_t block =
        here.first_q_block + int64_t{queries.head} * launch.q_blocks + queries.block;
    sums = launch.dq_sums + block * (C.m() * C.head_dim) + dq_part<C>(warpgroup).first_sum;
    turns = launch.turns + block * kBwdWarpgroups + warpgroup;
  }

  FLASH_DEVICE void wait(const Turn& turn) const {
    while (ptx::load_acquire(turns) != static_cast<uint32_t>(turn.before)) {
    }
  }
};

// One thread: takes what a warpgroup has staged to the sums, when it is its turn. The last of a
// block's visitors stages nothing (epilogue_bwd.h).
template <BwdConfig C>
FLASH_DEVICE void add_dq(const BwdLaunch& launch, BwdSmemPlan<C>& smem, int warpgroup) {
  const KeyTile& here = smem.tile;
  const DqPart part = dq_part<C>(warpgroup);
  const int staged = kWarpgroupRows * staged_columns(part.columns);
  const BwdSchedule schedule = schedule_of<C>(here.mask);
  RingPosition<1> position;
  for_each_visit(launch, here, [&](const QueryBlock& queries) {
    const Turn turn = schedule.turn(here.key_block, queries.block);
    if (turn.is_last()) return;
    const DqSums<C> to(launch, here, queries, warpgroup);
    const auto take = [&](int first) {
      const uint32_t from = ptx::shared_address(smem.dq[warpgroup]);
      const int bytes = staged * static_cast<int>(sizeof(float));
      wait_full(smem.dq_barriers[warpgroup], position);
      if (turn.before == 0) {
        ptx::bulk_store(to.sums + first, from, bytes);
      } else {
        if (first == 0) to.wait(turn);
        ptx::fence_proxy_async_global();
        ptx::bulk_add(to.sums + first, from, bytes);
      }
      ptx::bulk_commit_group();
      ptx::bulk_wait_group_read();
      ptx::mbarrier_arrive(empty(smem.dq_barriers[warpgroup], position));
      position.advance();
    };
    for (int first = 0; first < kWarpgroupRows * part.columns; first += staged) take(first);
    ptx::bulk_wait_group();
    ptx::fence_proxy_async_global();
    ptx::store_release(to.turns, static_cast<uint32_t>(turn.before + 1));
  });
}

}  // namespace flash::hopper
