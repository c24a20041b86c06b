// Attention of few queries over many keys, forward, for compute capability 9.0: wgmma and TMA.
//
// The query heads that share a key-value head are rows of one tile: row r is query r / group of
// head r % group. A CTA owns 64 such rows, the height of a wgmma, and some units of the sequence's
// keys (common/split_heuristic.h). Producer warps bring keys and values into rings of
// slots (decode_load.h); one warpgroup multiplies (decode_mainloop.h). Units are merged in the
// order of keys (decode_merge.h): by the CTA that has the tile for itself, or by the last to arrive
// of those that share it.
//
// Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), whose values are the first 512 of
// the keys' 576 columns, has an output of 64 x 512: two warpgroups have half of its columns each,
// and half of a block's keys (decode_share.h). K is read once for both products.
//
// What bounds it is memory, 14.5 bytes a cycle of each SM of an H100. By Little's law 40 KiB under
// way on an SM cover 1.5 microseconds of latency; rings hold 64 KiB a CTA at d = 64 and 128, of
// which two fit on an SM, 128 KiB at d = 256, 144 KiB at 576, of which half is read while the other
// is filled. MLA of 128 heads is bound by products as well: docs/hopper.md has the sums.
#pragma once

#include "hopper/decode_load.h"
#include "hopper/decode_mainloop.h"
#include "hopper/decode_merge.h"
#include "hopper/decode_output.h"
#include "warp/decode_query.h"
#include "warp/find_sequence.h"

namespace flash::hopper {

template <DecodeConfig C>
FLASH_DEVICE void init_barriers(const DecodeLaunch& launch, DecodeSmem<C>& smem) {
  init(smem.k_barriers, fills_of(launch), C.consumer_warps());
  if constexpr (!C.tile().v_within_k) init(smem.v_barriers, fills_of(launch), C.consumer_warps());
  ptx::fence_mbarrier_init();
}

// Q's rows to shared memory, for wgmma, by all that multiply.
template <DecodeConfig C>
FLASH_DEVICE void take_q(const FwdParams& p, const DecodeLaunch& launch, const DecodePlace<C>& here,
                         DecodeSmem<C>& smem) {
  using Q = typename DecodeSmem<C>::Q;
  const uint32_t sQ = ptx::shared_address(smem.q);
  load_q<C, Q>(p, launch, here, sQ);
  ptx::cp_async_wait_group<0>();
  consumer_barrier<C>();
  prepare_q<C, Q>(p, launch, here, sQ, [] { consumer_barrier<C>(); });
  ptx::fence_proxy_async();
  consumer_barrier<C>();
}

// A unit, whose output is in `total`: kept for the CTA that merges them if several share the tile,
// else merged with those before.
template <DecodeConfig C>
FLASH_DEVICE void keep_or_merge(DecodeTotal<C>& total, const typename WarpTile<C>::Rows& rows,
                                const DecodeLaunch& launch, const DecodePlace<C>& here,
                                const KeyUnits<C>& units, int unit, DecodeSmem<C>& smem,
                                int warpgroup) {
  const bool is_last = unit + 1 == units.count;
  if (units.mine.sharers > 1) {
    if (!has_kept_rows(launch)) return;
    const KeptUnit<C> kept(launch, here.tile, unit, warpgroup);
    kept.put(total.output);
    if (warpgroup == 0) kept.put_states(rows);
  } else if constexpr (C.tile().total_in_shared) {
    total.take(rows, SharedTotal<C>(smem), unit == 0, is_last, launch.scale_log2);
  } else if (has_kept_rows(launch)) {
    total.take(rows, KeptUnit<C>(launch, here.tile, 0, warpgroup), unit == 0, is_last,
               launch.scale_log2);
  }
}

// A warp that multiplies: this CTA's units, and the tile's output if it is its to write.
template <DecodeConfig C>
FLASH_DEVICE void consume(const FwdParams& p, const DecodeLaunch& launch,
                          const DecodePlace<C>& here, const KeyUnits<C>& units, DecodeSmem<C>& smem,
                          int warp) {
  const int warpgroup = warp / 4;
  DecodeTotal<C> total;
  if (units.count > 0) {
    take_q<C>(p, launch, here, smem);
    DecodeLoop<C> loop(p, launch, here, units, smem, warp);
#pragma unroll 1
    for (int unit = units.mine.begin; unit < units.mine.end; ++unit) {
      Softmax<C> softmax;
      total.clear_output();
      loop.attend(total.output, softmax, unit);
      keep_or_merge<C>(total, softmax.rows, launch, here, units, unit, smem, warpgroup);
    }
  }
  if (units.mine.sharers > 1) {
    if (!arrives_last<C>(launch.arrivals + here.tile, units.mine.sharers, smem.is_last)) return;
    total.clear_output();
    if (has_kept_rows(launch)) total.take_all(launch, here.tile, units.count, warpgroup);
  }
  store_total<C>(p, launch, here, total, smem, warpgroup);
}

// Where this CTA is, in shared memory; whether it has something to do.
template <DecodeConfig C>
FLASH_DEVICE bool find_place(const FwdParams& p, const DecodeLaunch& launch, DecodePlace<C> here,
                             DecodeSmem<C>& smem) {
  find_sequence(here, p, launch, smem.sequence);
  check_pages(p, launch, here);
  if (here.rows <= 0) return false;
  const KeyUnits<C> units(launch, here);
  if (here.sharer >= units.mine.sharers) return false;
  if (ptx::read_tid_x() == 0) {
    smem.here = here;
    smem.units = units;
  }
  __syncthreads();
  return true;
}

template <DecodeConfig C>
FLASH_DEVICE void mha_decode(const FwdParams& p, const DecodeLaunch& launch) {
  extern __shared__ __align__(1024) char memory[];
  auto& smem = *reinterpret_cast<DecodeSmem<C>*>(memory);
  const DecodePlace<C> place(p, launch, ptx::read_ctaid_x());
  if (place.batch == p.b) return store_rows_of_no_sequence<C>(p, launch, place);
  if (ptx::read_tid_x() == 0) init_barriers<C>(launch, smem);
  if (!find_place<C>(p, launch, place, smem)) return;
  // Which tells the compiler that they are uniform.
  const int warp = __shfl_sync(0xffffffffu, ptx::read_tid_x() / 32, 0);
  if (warp < C.consumer_warps()) {
    if constexpr (C.moves_registers()) ptx::setmaxnreg_inc<C.consumer_registers()>();
    consume<C>(p, launch, smem.here, smem.units, smem, warp);
  } else {
    if constexpr (C.moves_registers()) ptx::setmaxnreg_dec<C.producer_registers()>();
    if (smem.units.count > 0) produce<C>(p, launch, smem.here, smem.units, smem);
  }
}

}  // namespace flash::hopper
