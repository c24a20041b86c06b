// Where a CTA of the backward is, and what it fetches into shared memory.
#pragma once

#include "base/ptx/cp_async.h"
#include "base/ptx/special_registers.h"
#include "common/seqlen.h"
#include "sm80/bwd_params.h"
#include "sm80/bwd_smem.h"
#include "warp/load.h"

namespace flash::sm80 {

// This thread's place in its CTA. Where registers are short it is read anew each time, and what is
// computed from it is too. this_warp() is a shuffle: where all lanes come.
template <BwdConfig C>
FLASH_DEVICE int this_thread() {
  if constexpr (C.head_dim <= 64 && C.scores != ScoreClass::kModified)
    return static_cast<int>(threadIdx.x);
  return ptx::read_tid_x();
}
template <BwdConfig C>
FLASH_DEVICE int this_lane() {
  return this_thread<C>() & 31;
}
template <BwdConfig C>
FLASH_DEVICE int this_warp() {
  return __shfl_sync(0xffffffffu, this_thread<C>() >> 5, 0);  // which is known to be uniform
}

// Fetches a block's Q, dO, lse and delta.
template <BwdConfig C>
FLASH_DEVICE void fetch(uint32_t stage, const BwdParams& p, const BwdLaunch& launch,
                        const KeyTile& here, const QueryBlock& queries) {
  using Plan = BwdSmemPlan<C>;
  using Stage = typename Plan::Stage;
  constexpr int kM = C.tile().m;
  using Loader = TileLoader<typename Plan::Q, kM, C.threads()>;
  const int head = queries.head, row = queries.block * kM;
  const Loader q(operand_row(p.q, C.dtype, here.seq.batch, here.seq.q_row, head), here.seq.seqlen_q,
                 static_cast<int>(p.d));
  q.copy(stage + offsetof(Stage, q), row, p.q.row_stride * kElementBytes, launch.q_aligned);
  const Loader dout(operand_row(p.dout, C.dtype, here.seq.batch, here.seq.q_row, head),
                    here.seq.seqlen_q, static_cast<int>(p.d_v));
  dout.copy(stage + offsetof(Stage, dout), row, p.dout.row_stride * kElementBytes,
            launch.dout_aligned);
  const int i = ptx::read_tid_x();
  if (i < kM) {
    const bool exists = row + i < here.seq.seqlen_q;
    const float* lse = p.softmax_lse + here.seq.batch * p.lse_batch_stride +
                       head * p.lse_head_stride + here.seq.lse_row;
    ptx::cp_async_4_bytes(stage + offsetof(Stage, lse) + 4 * i, lse + row + i, exists);
    const int64_t first = p.cu_seqlens_q == nullptr ? 0 : here.seq.lse_row + 128 * here.seq.batch;
    const float* delta = p.dsoftmax_sum + here.seq.batch * p.dsoftmax_batch_stride +
                         head * p.dsoftmax_head_stride + first;
    ptx::cp_async_4_bytes(stage + offsetof(Stage, delta) + 4 * i, delta + row + i, exists);
  }
}

// Fetches K and V.
template <BwdConfig C>
FLASH_DEVICE void fetch_keys(uint32_t smem, const BwdParams& p, const BwdLaunch& launch,
                             const KeyTile& here) {
  using Plan = BwdSmemPlan<C>;
  using Loader = TileLoader<typename Plan::K, C.tile().n, C.threads()>;
  const auto copy = [&](int to, const Operand& x, int64_t head_dim, bool aligned) {
    const Loader loader(operand_row(x, C.dtype, here.seq.k_batch, here.seq.k_row, here.head_k),
                        here.seq.seqlen_k, static_cast<int>(head_dim));
    loader.copy(smem + to, here.first_key, x.row_stride * kElementBytes, aligned);
  };
  copy(offsetof(Plan, k), p.k, p.d, launch.k_aligned);
  copy(offsetof(Plan, v), p.v, p.d_v, launch.v_aligned);
}

}  // namespace flash::sm80
