// Attention, forward, for compute capability 8.0 and newer: cp.async, ldmatrix, mma.sync.
//
// A CTA of 4 warps owns 128 queries of one head and walks over the blocks of n keys (tile_table.h)
// that any of them sees, from the last to the first. A warp owns 32 queries: scores, probabilities,
// row maxima and sums and the output never leave its registers, and the accumulators of Q K^T are,
// packed to 16 bits, operand A of P V. Warps share K and V through a ring of three slots in shared
// memory (pipeline.h); a step, over K or over V, ends where the next one waits.
//
// What bounds it. A warp's block takes n d / 32 mma, d being the head dim, and a scheduler of an
// A100 8 cycles for each. The other instructions must fit beside: an FFMA, MUFU, FMNMX and FADD for
// each of a lane's n scores and half a pack, n d / 128 ldmatrix, d FMUL for the output.
// docs/cuda.md has the sum for each mma: 4.6 to 5.5 instructions at d = 64, 3.8 at d = 128. 32
// queries a warp rather than 16 halve the ldmatrix and the traffic of shared memory, the next
// bound.
//
// Memory traffic of a CTA: Q and O once, K and V of the visible blocks once, from L2 where the
// other CTAs of the head and of its GQA group have left them (common/tile_scheduler.h).
#pragma once

#include "base/ptx/special_registers.h"
#include "common/block_range.h"
#include "common/flash.h"
#include "common/seqlen.h"
#include "common/tile_scheduler.h"
#include "sm80/epilogue.h"
#include "sm80/fwd_params.h"
#include "sm80/load.h"
#include "sm80/pipeline.h"
#include "sm80/steps.h"

namespace flash::sm80 {

// Negates this thread's own copies of Q, for a negative scale: the maximum of scale * score is then
// that of the scores.
template <FwdConfig C>
FLASH_DEVICE void negate_q(uint32_t sQ) {
  constexpr int kChunks = C.tile().m * SmemTile<C.head_dim>::kChunks;
  for (int i = threadIdx.x; i < kChunks; i += C.threads()) {
    const uint32_t address = sQ + SmemTile<C.head_dim>::offset(i / SmemTile<C.head_dim>::kChunks,
                                                               i % SmemTile<C.head_dim>::kChunks);
    uint4 x = ptx::load_shared_16_bytes(address);
    x.x ^= 0x80008000u;
    x.y ^= 0x80008000u;
    x.z ^= 0x80008000u;
    x.w ^= 0x80008000u;
    ptx::store_shared(address, x);
  }
}

// Where this CTA and this warp are.
template <FwdConfig C>
struct Place {
  int batch, head, head_k;
  Sequence seq;
  Mask mask;
  int cta_row, warp_row;  // their first queries
  int warp, lane;

  FLASH_DEVICE Place(const FwdParams& p, const FwdLaunch& launch) {
    const Tile_coordinates tile = launch.scheduler.tile(ptx::read_ctaid_x());
    const int thread = ptx::read_tid_x();
    batch = tile.batch_head / launch.heads;
    head = tile.batch_head % launch.heads;
    head_k = head / launch.group;
    seq = sequence(p, batch);
    mask = mask_of(p, seq);
    warp = thread / 32;
    lane = thread % 32;
    cta_row = tile.m_block * C.tile().m;
    warp_row = cta_row + warp * C.rows_per_warp();
  }
};

// Writes out and softmax_lse. Finds its place anew: during the loop over keys every register
// counts.
template <FwdConfig C>
FLASH_DEVICE void epilogue(const FwdParams& p, const FwdLaunch& launch, uint32_t sO,
                           typename WarpTile<C>::Output& rO, typename WarpTile<C>::Rows& rows) {
  const Place<C> here(p, launch);
  const int valid_rows = min(C.rows_per_warp(), here.seq.seqlen_q - here.warp_row);
  const int64_t first_lse = here.batch * p.lse_batch_stride + here.head * p.lse_head_stride +
                            here.seq.lse_row + here.warp_row;
  float* lse = p.softmax_lse ? p.softmax_lse + first_lse : nullptr;
  normalise_o<C>(rO, rows, lse, valid_rows, launch.scale);
  char* gO = operand_row(p.o, C.dtype, here.batch, here.seq.q_row + here.warp_row, here.head);
  store_o<C>(rO, sO + here.warp * C.rows_per_warp() * WarpTile<C>::kRowBytes, gO,
             p.o.row_stride * kElementBytes, valid_rows, static_cast<int>(p.d_v));
}

template <FwdConfig C>
FLASH_DEVICE void mha_fwd(const FwdParams& p, const FwdLaunch& launch) {
  constexpr Tile kTile = C.tile();
  using W = WarpTile<C>;
  using Plan = SmemPlan<C>;
  extern __shared__ __align__(1024) char smem[];
  const uint32_t sQ = ptx::shared_address(smem) + offsetof(Plan, q);
  const uint32_t ring = ptx::shared_address(smem) + offsetof(Plan, ring);

  const Place<C> here(p, launch);
  const BlockRange blocks =
      block_range(here.mask, here.cta_row, here.cta_row + kTile.m - 1, kTile.n);
  const BlockRange mine =
      block_range(here.mask, here.warp_row, here.warp_row + C.rows_per_warp() - 1, kTile.n);

  const TileLoader<C, kTile.m> load_q(
      operand_row(p.q, C.dtype, here.batch, here.seq.q_row, here.head), p.q.row_stride,
      here.seq.seqlen_q, static_cast<int>(p.d));
  const TileLoader<C, kTile.n> load_k(
      operand_row(p.k, C.dtype, here.seq.k_batch, here.seq.k_row, here.head_k), p.k.row_stride,
      here.seq.seqlen_k, static_cast<int>(p.d));
  const TileLoader<C, kTile.n> load_v(
      operand_row(p.v, C.dtype, here.seq.k_batch, here.seq.k_row, here.head_k), p.v.row_stride,
      here.seq.seqlen_k, static_cast<int>(p.d_v));

  // Fetches a block into a slot, if there is such a block. Always a group of copies, maybe empty,
  // so that the number of groups under way tells which have landed.
  const auto fetch = [&](const TileLoader<C, kTile.n>& loader, int block, int slot) {
    if (block >= blocks.begin) loader.copy(ring + slot * kTile.n * W::kRowBytes, block * kTile.n);
    ptx::cp_async_commit_group();
  };
  constexpr int kAhead = (kTile.stages - 1) / 2;  // blocks
  PipeState<kTile.stages> pipe;
  // Begins a step: its slot is full, the one of the step before is free.
  const auto wait_and_fetch = [&](const TileLoader<C, kTile.n>& loader, int block) {
    ptx::cp_async_wait_group<kTile.stages - 2>();
    __syncthreads();
    fetch(loader, block - kAhead, pipe.freed());
  };

  const bool sees_keys = blocks.begin < blocks.end;
  if (sees_keys) load_q.copy(sQ, here.cta_row);
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    fetch(load_k, blocks.end - 1 - i, 2 * i);
    fetch(load_v, blocks.end - 1 - i, 2 * i + 1);
  }
  if (launch.negate_q && sees_keys) {
    ptx::cp_async_wait_group<kTile.stages - 2>();
    __syncthreads();
    negate_q<C>(sQ);
  }

  typename W::Output rO = {};
  typename W::Rows rows;
  clear_rows<C>(rows);
  const uint32_t warp_sQ = sQ + here.warp * C.rows_per_warp() * W::kRowBytes;
  const uint32_t lane_sQ = lane_address<C.head_dim>(warp_sQ, ptx::a_chunk(here.lane));
  for (int block = blocks.end - 1; block >= blocks.begin; --block) {
    typename W::Probabilities rP;
    wait_and_fetch(load_k, block);
    if (mine.contains(block)) {
      typename W::Scores rS;
      float rescale[W::kM][2];
      const uint32_t sK = ring + pipe.slot * kTile.n * W::kRowBytes;
      gemm_qk<C>(rS, lane_sQ, lane_address<C.head_dim>(sK, ptx::b_chunk_n_major(here.lane)));
      if (!mine.is_full(block)) apply_mask<C>(rS, here.mask, here.warp_row, block * kTile.n);
      softmax_step<C>(rP, rescale, rS, rows, launch.scale_log2);
      rescale_o<C>(rO, rescale);
    }
    pipe.advance();
    wait_and_fetch(load_v, block);
    if (mine.contains(block)) {
      const uint32_t sV = ring + pipe.slot * kTile.n * W::kRowBytes;
      gemm_pv<C>(rO, rP, lane_address<C.head_dim>(sV, ptx::b_chunk_k_major(here.lane)));
    }
    pipe.advance();
  }

  epilogue<C>(p, launch, sQ, rO, rows);
}

}  // namespace flash::sm80
