// From a warpgroup's accumulators to out and softmax_lse.
#pragma once

#include "base/ptx/tma.h"
#include "common/seqlen.h"
#include "hopper/fwd_params.h"
#include "hopper/mainloop_fwd.h"
#include "hopper/named_barrier.h"
#include "hopper/smem.h"
#include "hopper/to_shared.h"
#include "warp/epilogue.h"

namespace flash::hopper {

// A warpgroup's rows of O, on their way from registers through shared memory. By TMA, which leaves
// out what lies outside the tensor and goes on while the next tile is computed; by the warps where
// rows of another sequence follow.
template <FwdConfig C>
class OutputStore {
 public:
  FLASH_DEVICE OutputStore(SmemPlan<C>& smem, int warpgroup) : smem_(smem), warpgroup_(warpgroup) {}

  // Writes out and softmax_lse.
  FLASH_DEVICE void store(const FwdParams& p, const FwdLaunch& launch, const Place<C>& here,
                          typename WarpTile<C>::Output& rO, Softmax<C>& softmax) {
    const Sequence& seq = here.sequence();
    normalise(p, launch, here, rO, softmax);
    wait_for_shared_memory();
    if (launch.is_packed && here.row() + kWarpgroupRows > seq.seqlen_q) {
      char* gO =
          operand_row(p.o, C.o_dtype(), here.batch(), seq.q_row + here.warp_row(), here.head());
      store_o<C, O, C.o_dtype()>(rO, shared() + warp() * 16 * O::kRowBytes, gO,
                                 p.o.row_stride * kElementBytes, launch.o_aligned, valid_rows(here),
                                 static_cast<int>(p.d_v));
      // Before TMA writes to where O was.
      if constexpr (!Plan::kTile.o_apart) ptx::fence_proxy_async();
      return;
    }
    accumulators_to_shared<C, O, C.o_dtype()>(shared() + warp() * 16 * O::kRowBytes, rO);
    ptx::fence_proxy_async();
    warpgroup_barrier(warpgroup_);
    if (!stores()) return;
    ptx::BoxPlace at{0, static_cast<int>(seq.q_row) + here.row(), here.head(),
                     launch.is_packed ? 0 : here.batch()};
#pragma unroll
    for (int g = 0; g < O::kGroups; ++g) {
      at.column = g * O::kGroupCols;
      ptx::tma_store(launch.o, at, shared() + g * O::kGroupBytes);
    }
    ptx::bulk_commit_group();
  }

  // Until shared memory has been read.
  FLASH_DEVICE void finish() const {
    if (stores()) ptx::bulk_wait_group_read();
  }

 private:
  using Plan = SmemPlan<C>;
  using O = typename Plan::O;

  FLASH_DEVICE static int warp() { return ptx::read_tid_x() / 32 % 4; }
  // The thread that deals with TMA.
  FLASH_DEVICE static bool stores() { return ptx::read_tid_x() % kWarpgroupThreads == 0; }
  FLASH_DEVICE static int valid_rows(const Place<C>& here) {
    return min(16, here.sequence().seqlen_q - here.warp_row());
  }
  // The warpgroup's first row, in O's tile or in Q's.
  FLASH_DEVICE uint32_t shared() const {
    return ptx::shared_address(Plan::kTile.o_apart ? smem_.o : smem_.q[0]) +
           warpgroup_ * kWarpgroupRows * O::kRowBytes;
  }

  // The tile before has left it; where it is Q's, all warps have multiplied Q.
  FLASH_DEVICE void wait_for_shared_memory() const {
    finish();
    warpgroup_barrier(warpgroup_);
  }

  FLASH_DEVICE static void normalise(const FwdParams& p, const FwdLaunch& launch,
                                     const Place<C>& here, typename WarpTile<C>::Output& rO,
                                     Softmax<C>& softmax) {
    const int64_t first = here.batch() * p.lse_batch_stride + here.head() * p.lse_head_stride +
                          here.sequence().lse_row + here.warp_row();
    float* lse = p.softmax_lse ? p.softmax_lse + first : nullptr;
    const float factor =
        softmax.finish() * (C.scores == ScoreClass::kModified ? launch.dropout.rescale : 1.f);
    normalise_o<C>(rO, softmax.rows, lse, valid_rows(here), here.scale(launch),
                   sink_logit(p, here.head()), factor);
  }

  SmemPlan<C>& smem_;
  int warpgroup_;
};

// Rows of out that belong to no sequence become 0, their softmax_lse -inf: those of the tile's
// head, the tile's share of them, by all threads that multiply.
template <FwdConfig C>
FLASH_DEVICE void store_rows_of_no_sequence(const FwdParams& p, const WorkTile& tile, int thread) {
  const int64_t first = p.cu_seqlens_q[p.b];
  if (first < 0) return;
  for (int64_t row = first + tile.place.m_block; row < p.total_q; row += tile.place.others) {
    auto* o = reinterpret_cast<uint16_t*>(operand_row(p.o, C.o_dtype(), 0, row, tile.head));
    for (int i = thread; i < p.d_v; i += C.consumer_warps() * 32) o[i] = 0;
    if (p.softmax_lse != nullptr && thread == 0)
      p.softmax_lse[tile.head * p.lse_head_stride + row] = -INFINITY;
  }
}

}  // namespace flash::hopper
