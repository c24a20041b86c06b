// Attention, forward, for compute capability 8.0 and newer: cp.async, ldmatrix, mma.sync.
//
// A CTA of 4 warps owns 64 or 128 queries of one head and walks over the blocks of n keys
// (tile_table.h) that any of them sees, from the last to the first. A warp owns 16 or 32 queries:
// scores, probabilities, row maxima and sums and the output never leave its registers, and the
// accumulators of Q K^T are, packed to 16 bits, operand A of P V. Warps share K and V through a
// ring of three slots in shared memory (pipeline.h); a step, over K or over V, ends where the next
// one waits. Sequences are dense, packed or in pages: load.h.
//
// What bounds it. A warp's block takes n d / 32 mma, d being the head dim, and a scheduler of an
// A100 8 cycles for each. The other instructions must fit beside: an FFMA, MUFU, FMNMX and FADD for
// each of a lane's n scores and half a pack, n d / 128 ldmatrix, d FMUL for the output where a
// maximum grows. docs/cuda.md has the sum for each mma. 32 queries a warp rather than 16 halve the
// ldmatrix and the traffic of shared memory, the next bound.
//
// Memory traffic of a CTA: Q and O once, K and V of the visible blocks once, from L2 where the
// other CTAs of the head and of its GQA group have left them (common/tile_scheduler.h).
#pragma once

#include "base/ptx/special_registers.h"
#include "common/block_range.h"
#include "common/bounded_sequence.h"
#include "common/flash.h"
#include "common/tile_scheduler.h"
#include "sm80/fwd_params.h"
#include "sm80/pipeline.h"
#include "sm80/query.h"
#include "sm80/smem.h"
#include "sm80/steps.h"
#include "warp/contain.h"
#include "warp/epilogue.h"
#include "warp/load.h"
#include "warp/mask.h"
#include "warp/packed_tile.h"
#include "warp/report.h"
#include "warp/score.h"

namespace flash::sm80 {

// Puts this CTA's tile into shared memory. One thread reads index tensors and checks them: the
// others need no registers for it, and the compiler knows that all find the same.
template <FwdConfig C>
FLASH_DEVICE void find_tile(CtaTile& tile, const FwdParams& p, const FwdLaunch& launch) {
  if (ptx::read_tid_x() < 32) {
    const Tile_coordinates number = launch.scheduler.tile(ptx::read_ctaid_x());
    PackedTile found{number.batch_head / launch.heads, number.m_block, 0};
    if (p.cu_seqlens_q != nullptr)
      found = packed_tile<C.tile().m>(p.cu_seqlens_q, p.seqlen_q, static_cast<int>(p.b),
                                      number.m_block, launch.scheduler.m_blocks);
    if (ptx::read_tid_x() == 0) {
      IndexFaults faults = 0;
      tile.place = found;
      tile.sequence = found.batch < p.b
                          ? bounded_sequence(p, found.batch, launch.bounds.max_cached, faults)
                          : Sequence{};  // the rows of no sequence
      if (faults != 0) report(launch.bounds, faults);
    }
  }
  __syncthreads();
}

// Where this CTA and this warp are.
template <FwdConfig C>
struct Place {
  int batch, head, head_k;
  Sequence seq;
  Mask mask;
  int m_block;            // of the sequence
  int cta_row, warp_row;  // their first queries
  int warp, lane;

  // `tile`: what find_tile has found.
  FLASH_DEVICE Place(const FwdParams& p, const FwdLaunch& launch, const CtaTile& tile)
      : batch(tile.place.batch), seq(tile.sequence), m_block(tile.place.m_block) {
    const int thread = ptx::read_tid_x();
    head = launch.scheduler.tile(ptx::read_ctaid_x()).batch_head % launch.heads;
    head_k = head / launch.group;
    mask = mask_of(p, seq);
    warp = __shfl_sync(0xffffffffu, thread / 32, 0);  // which tells the compiler that it is uniform
    lane = thread % 32;
    cta_row = m_block * C.tile().m;
    warp_row = cta_row + warp * C.rows_per_warp();
  }
};

// Blocks of K and V on their way through the ring.
template <FwdConfig C>
class KeyBlocks {
 public:
  FLASH_DEVICE KeyBlocks(const FwdParams& p, const FwdLaunch& launch, const Place<C>& here,
                         uint32_t ring, int first_block)
      : p_(p),
        launch_(launch),
        k_(first_row(p, p.k, here), here.seq.seqlen_k, static_cast<int>(p.d)),
        v_(first_row(p, p.v, here), here.seq.seqlen_k, static_cast<int>(p.d_v)),
        pages_(here.seq.pages),
        leftpad_(here.seq.leftpad),
        ring_(ring),
        first_block_(first_block) {}

  // Fetches the first blocks, from `block` down.
  FLASH_DEVICE void begin(int block) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      fetch_k(block - i, 2 * i);
      fetch_v(block - i, 2 * i + 1);
    }
  }

  // Begins a step over K, or V, of `block`: its slot is full, the one of the step before is free.
  // Returns the slot's address.
  FLASH_DEVICE uint32_t next_k(int block) {
    wait();
    fetch_k(block - kAhead, pipe_.freed());
    return take();
  }
  FLASH_DEVICE uint32_t next_v(int block) {
    wait();
    fetch_v(block - kAhead, pipe_.freed());
    return take();
  }

  FLASH_DEVICE static void wait() {
    ptx::cp_async_wait_group<kTile.stages - 2>();
    __syncthreads();
  }

 private:
  static constexpr Tile kTile = C.tile();
  static constexpr int kAhead = (kTile.stages - 1) / 2;  // blocks
  using Plan = SmemPlan<C>;

  FLASH_DEVICE static const void* first_row(const FwdParams& p, const Operand& x,
                                            const Place<C>& here) {
    const Sequence& seq = here.seq;
    if (seq.pages) return operand_row(x, C.dtype, 0, 0, here.head_k);
    return operand_row(x, C.dtype, seq.k_batch, seq.k_row + seq.leftpad, here.head_k);
  }

  FLASH_DEVICE uint32_t take() {
    const uint32_t slot = ring_ + pipe_.slot * Plan::kSlotBytes;
    pipe_.advance();
    return slot;
  }

  // Fetches a block into a slot, if there is such a block. Always a group of copies, maybe empty,
  // so that the number of groups under way tells which have landed.
  FLASH_DEVICE void fetch_k(int block, int slot) {
    if (block >= first_block_) copy(k_, p_.k, launch_.k_aligned, block, slot);
    ptx::cp_async_commit_group();
  }
  FLASH_DEVICE void fetch_v(int block, int slot) {
    if (block >= first_block_) copy(v_, p_.v, launch_.v_aligned, block, slot);
    ptx::cp_async_commit_group();
  }

  template <class Loader>
  FLASH_DEVICE void copy(const Loader& loader, const Operand& x, bool aligned, int block,
                         int slot) const {
    const uint32_t shared = ring_ + slot * Plan::kSlotBytes;
    const int64_t row_bytes = x.row_stride * kElementBytes;
    if (p_.block_table == nullptr) {
      loader.copy(shared, block * kTile.n, row_bytes, aligned);
    } else {
      loader.copy(shared, block * kTile.n, row_bytes, aligned,
                  {pages_, static_cast<int>(p_.k_entries), leftpad_, launch_.page_size},
                  x.batch_stride * kElementBytes);
    }
  }

  const FwdParams& p_;
  const FwdLaunch& launch_;
  const TileLoader<typename Plan::K, kTile.n, C.threads()> k_;
  const TileLoader<typename Plan::V, kTile.n, C.threads()> v_;
  const int32_t* pages_;
  int leftpad_;
  uint32_t ring_;
  int first_block_;  // of those that are visited
  PipeState<kTile.stages> pipe_;
};

// Rows of out that belong to no sequence become 0, their softmax_lse -inf: those of this CTA's
// head, this CTA's share of them.
template <FwdConfig C>
FLASH_DEVICE void store_rows_of_no_sequence(const FwdParams& p, const Place<C>& here,
                                            const PackedTile& tile) {
  const int64_t first = p.cu_seqlens_q[p.b];
  if (first < 0) return;
  for (int64_t row = first + here.m_block; row < p.total_q; row += tile.others) {
    auto* o = reinterpret_cast<uint16_t*>(operand_row(p.o, C.dtype, 0, row, here.head));
    for (int i = threadIdx.x; i < p.d_v; i += C.threads()) o[i] = 0;
    if (p.softmax_lse != nullptr && threadIdx.x == 0)
      p.softmax_lse[here.head * p.lse_head_stride + row] = -INFINITY;
  }
}

// One CTA of each sequence looks for pages that do not exist.
template <FwdConfig C>
FLASH_DEVICE void check_pages(const FwdParams& p, const FwdLaunch& launch, const Place<C>& here) {
  if (here.seq.pages == nullptr || here.m_block != 0 || here.head != 0) return;
  const IndexFaults faults = page_faults(here.seq, launch.page_size, p.k_entries, C.threads());
  if (faults != 0) report(launch.bounds, faults);
}

// Negates and rotates the tile of Q, once its copies have landed.
template <FwdConfig C>
FLASH_DEVICE void prepare_q(const FwdParams& p, const FwdLaunch& launch, const Place<C>& here,
                            uint32_t sQ) {
  using Q = typename SmemPlan<C>::Q;
  if (!launch.negate_q && p.rotary_dim == 0) return;
  KeyBlocks<C>::wait();
  if (launch.negate_q) negate_q<Q, C.tile().m, C.threads()>(sQ);
  if (p.rotary_dim == 0) return;
  if (launch.negate_q) __syncthreads();
  const bool positions_differ = p.window_left >= 0 || p.window_right >= 0;
  rotate_q<C.dtype, Q, C.threads()>(
      p, sQ, min(C.tile().m, here.seq.seqlen_q - here.cta_row), threadIdx.x,
      [&](int row) { return here.seq.cached + (positions_differ ? here.cta_row + row : 0); });
}

// Writes out and softmax_lse. Finds its place anew: during the loop over keys every register
// counts.
template <FwdConfig C>
FLASH_DEVICE void epilogue(const FwdParams& p, const FwdLaunch& launch, const CtaTile& tile,
                           uint32_t sO, typename WarpTile<C>::Output& rO,
                           typename WarpTile<C>::Rows& rows) {
  using O = typename SmemPlan<C>::O;
  const Place<C> here(p, launch, tile);
  const int valid_rows = min(C.rows_per_warp(), here.seq.seqlen_q - here.warp_row);
  const int64_t first_lse = here.batch * p.lse_batch_stride + here.head * p.lse_head_stride +
                            here.seq.lse_row + here.warp_row;
  float* lse = p.softmax_lse ? p.softmax_lse + first_lse : nullptr;
  const float rescale = C.scores == ScoreClass::kModified ? launch.dropout.rescale : 1.f;
  normalise_o<C>(rO, rows, lse, valid_rows, launch.scale, sink_logit(p, here.head), rescale);
  char* gO = operand_row(p.o, C.dtype, here.batch, here.seq.q_row + here.warp_row, here.head);
  store_o<C, O>(rO, sO + here.warp * C.rows_per_warp() * O::kRowBytes, gO,
                p.o.row_stride * kElementBytes, launch.o_aligned, valid_rows,
                static_cast<int>(p.d_v));
}

// The blocks that a warp visits, among those of its CTA.
template <FwdConfig C>
struct WarpBlocks : BlockRange {
  FLASH_DEVICE explicit WarpBlocks(const Place<C>& here)
      : BlockRange(block_range(here.mask, here.warp_row, here.warp_row + C.rows_per_warp() - 1,
                               C.tile().n)) {}
};

// Without a mask, all or none: of less state.
template <FwdConfig C>
  requires(C.scores == ScoreClass::kUnmasked)
struct WarpBlocks<C> {
  bool has_rows;
  int full_end;

  FLASH_DEVICE explicit WarpBlocks(const Place<C>& here)
      : has_rows(here.warp_row < here.seq.seqlen_q), full_end(here.seq.seqlen_k / C.tile().n) {}
  FLASH_DEVICE bool contains(int) const { return has_rows; }
  FLASH_DEVICE bool is_full(int block) const { return block < full_end; }
};

// A warp's step over a block of K: its probabilities rP, and rO to the new maxima. `sQ` is this
// lane's address.
template <FwdConfig C>
FLASH_DEVICE void attend(typename WarpTile<C>::Probabilities& rP, typename WarpTile<C>::Output& rO,
                         typename WarpTile<C>::Rows& rows, const FwdParams& p,
                         const FwdLaunch& launch, const Place<C>& here, uint32_t sQ, uint32_t sK,
                         int block, bool is_full) {
  using W = WarpTile<C>;
  typename W::Scores rS;
  float rescale[W::kM][2];
  const int first_key = block * C.tile().n;
  gemm_qk<C>(rS, sQ, lane_address<typename SmemPlan<C>::K>(sK, ptx::b_chunk_n_major(here.lane)));
  if constexpr (C.scores == ScoreClass::kModified) {
    if (launch.modifies_scores)
      modify_scores<C>(rS, p, {here.batch, here.head, here.warp_row, here.mask}, first_key);
  }
  if (!is_full) apply_mask<C>(rS, here.mask, here.warp_row, first_key);
  softmax_step<C>(rP, rescale, rS, rows, launch.scale_log2);
  if constexpr (C.scores == ScoreClass::kModified) {
    if (launch.dropout.enabled)
      drop<C>(rP, launch.dropout, static_cast<uint32_t>(here.batch * launch.heads + here.head),
              here.warp_row, first_key);
  }
  rescale_o<C>(rO, rescale);
}

// A warp's step over a block of V.
template <FwdConfig C>
FLASH_DEVICE void accumulate(typename WarpTile<C>::Output& rO,
                             const typename WarpTile<C>::Probabilities& rP, const Place<C>& here,
                             uint32_t sV, int block, bool is_full) {
  using V = typename SmemPlan<C>::V;
  if (C.scores != ScoreClass::kUnmasked && !is_full && !is_finite<C>(sV)) {
    gemm_pv_by_keys<C, V>(rO, rP, sV, here.mask, here.warp_row, block * C.tile().n);
  } else {
    gemm_pv<C>(rO, rP, lane_address<V>(sV, ptx::b_chunk_k_major(here.lane)));
  }
}

template <FwdConfig C>
FLASH_DEVICE void mha_fwd(const FwdParams& p, const FwdLaunch& launch) {
  using Plan = SmemPlan<C>;
  constexpr Tile kTile = C.tile();
  extern __shared__ __align__(1024) char smem[];
  const uint32_t sQ = ptx::shared_address(smem) + offsetof(Plan, q);

  CtaTile& tile = reinterpret_cast<Plan*>(smem)->tile;
  find_tile<C>(tile, p, launch);
  const Place<C> here(p, launch, tile);
  if (here.batch == p.b) return store_rows_of_no_sequence(p, here, tile.place);
  check_pages(p, launch, here);
  if (here.cta_row >= here.seq.seqlen_q) return;
  const BlockRange blocks =
      block_range(here.mask, here.cta_row, here.cta_row + kTile.m - 1, kTile.n);
  const WarpBlocks<C> mine(here);

  KeyBlocks<C> keys(p, launch, here, ptx::shared_address(smem) + offsetof(Plan, ring),
                    blocks.begin);
  if (blocks.begin < blocks.end) {
    const TileLoader<typename Plan::Q, kTile.m, C.threads()> load_q(
        operand_row(p.q, C.dtype, here.batch, here.seq.q_row, here.head), here.seq.seqlen_q,
        static_cast<int>(p.d));
    load_q.copy(sQ, here.cta_row, p.q.row_stride * kElementBytes, launch.q_aligned);
    keys.begin(blocks.end - 1);
    prepare_q(p, launch, here, sQ);
  }

  using W = WarpTile<C>;
  typename W::Output rO = {};
  typename W::Rows rows;
  clear_rows<C>(rows);
  const uint32_t warp_sQ = lane_address<typename Plan::Q>(
      sQ + here.warp * C.rows_per_warp() * Plan::Q::kRowBytes, ptx::a_chunk(here.lane));
  for (int block = blocks.end - 1; block >= blocks.begin; --block) {
    typename W::Probabilities rP;
    const bool is_full = mine.is_full(block);
    const uint32_t sK = keys.next_k(block);
    if (mine.contains(block)) attend<C>(rP, rO, rows, p, launch, here, warp_sQ, sK, block, is_full);
    const uint32_t sV = keys.next_v(block);
    if (mine.contains(block)) accumulate<C>(rO, rP, here, sV, block, is_full);
  }

  epilogue<C>(p, launch, tile, sQ, rO, rows);
}

}  // namespace flash::sm80
