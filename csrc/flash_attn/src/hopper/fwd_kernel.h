// Attention, forward, for compute capability 9.0: TMA, wgmma, warp specialisation.
//
// A CTA stays on its SM and takes tile after tile of 128 or 192 queries of one head. Its first
// warpgroup keeps few registers: one warp finds the tiles and copies Q, K and V by TMA (load.h),
// three look through blocks of V that a mask cuts. Two or three warpgroups multiply, 64 queries
// each (mainloop_fwd.h): S = Q K^T with both operands in shared memory, O += P V with P in
// registers. Rings of slots with mbarriers lie between (pipeline.h). docs/hopper.md draws it and
// tells what bounds it.
#pragma once

#include "hopper/epilogue_fwd.h"
#include "hopper/load.h"
#include "hopper/mainloop_fwd.h"

namespace flash::hopper {

// Whether warps look through V, or transpose it.
template <FwdConfig C>
FLASH_DEVICE bool has_inspectors(const FwdLaunch& launch) {
  return C.is_fp8() || launch.inspects_v;
}

template <FwdConfig C>
FLASH_DEVICE void init_barriers(const FwdLaunch& launch, SmemPlan<C>& smem) {
  const int inspectors = has_inspectors<C>(launch) ? kInspectors : 0;
  init(smem.q_barriers, 1, C.consumer_warps());
  init(smem.k_barriers, 1, C.cluster() * C.consumer_warps());
  init(smem.v_barriers, 1, C.cluster() * C.consumer_warps() + inspectors);
  init(smem.tile_barriers, 1, C.consumer_warps() + inspectors);
  for (int i = 0; i < C.tile().stages; ++i) {
    ptx::mbarrier_init(ptx::shared_address(&smem.inspected[i]), kInspectors);
    ptx::store_shared(ptx::shared_address(smem.not_finite[i]), 0u);
  }
  ptx::fence_mbarrier_init();
}

// A warpgroup that multiplies.
template <FwdConfig C>
FLASH_DEVICE void consume(const FwdParams& p, const FwdLaunch& launch, SmemPlan<C>& smem,
                          int warpgroup) {
  using W = WarpTile<C>;
  RingPosition<kTileSlots> tiles;
  Mainloop<C> mainloop(p, launch, smem, warpgroup);
  OutputStore<C> output(smem, warpgroup);
  for (;;) {
    wait_full(smem.tile_barriers, tiles);
    const WorkTile& tile = smem.tiles[tiles.slot()];
    if (tile.is_last) break;
    if (tile.place.batch == p.b) {
      store_rows_of_no_sequence<C>(p, tile, ptx::read_tid_x() - kWarpgroupThreads);
    } else {
      const Place<C> here(p, tile, warpgroup);
      typename W::Output rO = {};
      Softmax<C> softmax;
      const BlockRange blocks = here.cta_blocks();
      const bool has_keys = blocks.begin < blocks.end;
      const bool has_q = has_keys || !C.tile().o_apart;
      if (has_q) mainloop.wait_q(here);
      if (has_keys) mainloop.attend(rO, softmax, here);
      if (C.tile().o_apart && has_q) mainloop.release_q();
      output.store(p, launch, here, rO, softmax);
      if (!C.tile().o_apart) {
        output.finish();
        __syncwarp();
        mainloop.release_q();
      }
    }
    __syncwarp();
    leave(smem.tile_barriers, tiles);
    tiles.advance();
  }
  output.finish();
}

template <FwdConfig C>
FLASH_DEVICE void mha_fwd(const FwdParams& p, const FwdLaunch& launch) {
  extern __shared__ __align__(1024) char memory[];
  auto& smem = *reinterpret_cast<SmemPlan<C>*>(memory);
  // Which tells the compiler that they are uniform.
  const int warp = __shfl_sync(0xffffffffu, ptx::read_tid_x() / 32, 0);
  if (ptx::read_tid_x() == 0) init_barriers<C>(launch, smem);
  if constexpr (C.cluster() > 1) {
    ptx::cluster_sync();
  } else {
    __syncthreads();
  }
  if (warp < 4) {
    ptx::setmaxnreg_dec<C.producer_registers()>();
    if (warp == 0) {
      produce<C>(p, launch, smem);
    } else if (has_inspectors<C>(launch)) {
      inspect<C>(p, launch, smem, warp - 1);
    }
  } else {
    ptx::setmaxnreg_inc<C.consumer_registers()>();
    consume<C>(p, launch, smem, warp / 4 - 1);
  }
  // Until the others of a cluster need this one's shared memory no more.
  if constexpr (C.cluster() > 1) ptx::cluster_sync();
}

}  // namespace flash::hopper
