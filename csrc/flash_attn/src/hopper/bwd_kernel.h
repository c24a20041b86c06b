// Attention, backward, for compute capability 9.0: TMA, wgmma, warp specialisation.
//
// FlashAttention-2 (arXiv:2307.08691), algorithm 2. With P = exp(scale S - lse) recomputed and
// delta = rowsum(dO * O) - dlse, which bwd_prepare.h has left in softmax_d:
//
//   S = Q K^T, dP = dO V^T, dS = P * (dP - delta)
//   dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K
//
// A CTA owns 128 keys of one key-value head and walks over the blocks of queries that see any of
// them, from the last down, each for all query heads of its group. Two warpgroups have 64 keys
// each, and their dK and dV in registers (mainloop_bwd.h). Scores are transposed, so that P^T and
// dS^T are, as they lie in registers, the A of dV and dK; dS^T goes to shared memory once, for dQ.
// One warp copies by TMA, two take dQ to its sums in memory, in a fixed order (load_bwd.h).
// docs/hopper.md draws it.
#pragma once

#include <type_traits>

#include "hopper/mainloop_bwd.h"
#include "hopper/mainloop_bwd_wide.h"
#include "warp/find_key_tile.h"

namespace flash::hopper {

template <BwdConfig C>
FLASH_DEVICE void init_barriers(BwdSmemPlan<C>& smem) {
  init(smem.q_barriers, 1, C.consumer_warps());
  init(smem.dout_barriers, 1, C.consumer_warps());
  for (auto& barriers : smem.dq_barriers) init(barriers, 4, 1);
  ptx::mbarrier_init(ptx::shared_address(&smem.k_full), 1);
  ptx::mbarrier_init(ptx::shared_address(&smem.v_full), 1);
  ptx::fence_mbarrier_init();
}

// A warpgroup that multiplies.
template <BwdConfig C, int kPart>
FLASH_DEVICE void consume(const BwdParams& p, const BwdLaunch& launch, BwdSmemPlan<C>& smem,
                          int warpgroup) {
  using Mainloop =
      std::conditional_t<C.tile().keys_apart(), BwdMainloop<C, kPart>, BwdWideMainloop<C, kPart>>;
  typename Mainloop::KeyGradient rdK = {}, rdV = {};
  Mainloop mainloop(p, launch, smem, warpgroup);
  mainloop.walk(rdK, rdV);
  mainloop.meet();
  store_key_gradients<C, Mainloop::kColumns>(p, launch, smem, rdK, rdV,
                                             Mainloop::key_part(warpgroup), warpgroup);
}

template <BwdConfig C>
FLASH_DEVICE void mha_bwd(const BwdParams& p, const BwdLaunch& launch) {
  extern __shared__ __align__(1024) char memory[];
  auto& smem = *reinterpret_cast<BwdSmemPlan<C>*>(memory);
  // Which tells the compiler that they are uniform.
  const int warp = __shfl_sync(0xffffffffu, ptx::read_tid_x() / 32, 0);
  if (warp == 0) find_key_tile<C.m(), C.n()>(smem.tile, p, launch);
  if (ptx::read_tid_x() == 0) init_barriers<C>(smem);
  __syncthreads();
  if (smem.tile.place.batch == p.b)
    return clear_rows_of_no_sequence<C.dtype, C.threads()>(p, smem.tile);
  if (smem.tile.keys <= 0) return;
  if (warp < 4) {
    ptx::setmaxnreg_dec<C.producer_registers()>();
    if (warp == 0) {
      produce<C>(p, launch, smem);
    } else if (warp <= kBwdWarpgroups && ptx::read_tid_x() % 32 == 0) {
      add_dq<C>(launch, smem, warp - 1);
    }
    return;
  }
  ptx::setmaxnreg_inc<C.consumer_registers()>();
  constexpr bool kAlike = dq_part<C>(0).columns == dq_part<C>(1).columns;
  if (kAlike || warp < 8) {
    consume<C, 0>(p, launch, smem, warp / 4 - 1);
  } else if constexpr (!kAlike) {
    consume<C, 1>(p, launch, smem, 1);
  }
}

}  // namespace flash::hopper
