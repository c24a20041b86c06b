// Units' results, and their merge in the order of keys.
//
// They are accumulators as the wgmma have left them. Where several CTAs share a tile, each unit
// goes to the workspace, and the CTA that arrives last merges all; where a CTA has the tile for
// itself, it merges unit after unit, and keeps the total in shared memory or, where that has no
// room, in the workspace. The arithmetic is the same.
#pragma once

#include "base/ptx/atomic.h"
#include "hopper/decode_params.h"
#include "hopper/decode_share.h"
#include "hopper/decode_smem.h"
#include "warp/decode_place.h"
#include "warp/merge_accumulators.h"
#include "warp/rows.h"

namespace flash::hopper {

// Whether this warp has rows in the workspace.
FLASH_DEVICE bool has_kept_rows(const DecodeLaunch& launch) {
  return ptx::read_tid_x() / 32 % 4 < launch.kept_warps;
}

// A lane's part of a unit in the workspace: [tile, unit, warpgroup, warp, n8 tile, lane] of four
// accumulators each, so that a warp stores 512 bytes at a time; states [tile, unit, row].
template <DecodeConfig C>
class KeptUnit {
 public:
  using W = WarpTile<C>;

  FLASH_DEVICE KeptUnit(const DecodeLaunch& launch, int tile, int unit, int warpgroup) {
    const int warp = ptx::read_tid_x() / 32 % 4, lane = ptx::read_tid_x() % 32;
    const int64_t number = static_cast<int64_t>(tile) * launch.kept_units + unit;
    warps_ = C.tile().warpgroups * launch.kept_warps;
    outputs_ = reinterpret_cast<float4*>(launch.unit_outputs) +
               (number * warps_ + warpgroup * launch.kept_warps + warp) * kOfWarp + lane;
    states_ = launch.unit_states + (number * launch.kept_warps + warp) * 16 + lane / 4;
  }

  // To the tile's next unit.
  FLASH_DEVICE void advance() {
    outputs_ += warps_ * kOfWarp;
    states_ += warps_ / C.tile().warpgroups * 16;
  }

  FLASH_DEVICE float4 output(int n) const { return __ldcg(outputs_ + n * 32); }
  FLASH_DEVICE void put(const typename W::Output& rO) const {
#pragma unroll
    for (int n = 0; n < W::kO; ++n) __stcg(outputs_ + n * 32, accumulators_of(rO, n));
  }

  FLASH_DEVICE void get_states(typename W::Rows& rows) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 x = __ldcg(reinterpret_cast<const float2*>(states_ + 8 * half));
      rows[0][half] = RowState{x.x, x.y};
    }
  }

  FLASH_DEVICE void put_states(const typename W::Rows& rows) const {
    if (ptx::read_tid_x() % 4 != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      __stcg(reinterpret_cast<float2*>(states_ + 8 * half),
             make_float2(rows[0][half].max, rows[0][half].sum));
  }

 private:
  static constexpr int kOfWarp = W::kO * 32;

  float4* outputs_;
  RowState* states_;
  int warps_;  // of a unit
};

// A lane's part of the total in shared memory, where KeptUnit would have it in the workspace.
template <DecodeConfig C>
class SharedTotal {
 public:
  FLASH_DEVICE explicit SharedTotal(DecodeSmem<C>& smem)
      : outputs_(reinterpret_cast<float4*>(smem.total[0][ptx::read_tid_x()])) {}
  FLASH_DEVICE float4 output(int n) const { return outputs_[n * kWarpgroupThreads]; }
  FLASH_DEVICE void put(const typename WarpTile<C>::Output& rO) const {
#pragma unroll
    for (int n = 0; n < WarpTile<C>::kO; ++n)
      outputs_[n * kWarpgroupThreads] = accumulators_of(rO, n);
  }

 private:
  float4* outputs_;
};

// A tile's output: this lane's part.
template <DecodeConfig C>
struct DecodeTotal {
  using W = WarpTile<C>;

  typename W::Output output;  // a unit's, then the total
  typename W::Rows rows;      // the total's

  FLASH_DEVICE DecodeTotal() {
    clear_output();
    clear_rows<C>(rows);
  }

  FLASH_DEVICE void clear_output() {
#pragma unroll
    for (int n = 0; n < W::kO; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) output[0][n][i] = 0.f;
  }

  // Merges the unit in `output` into what there is so far, nothing if it is the first, else in
  // `kept`: there too if more units follow.
  template <class Kept>
  FLASH_DEVICE void take(const typename W::Rows& unit_rows, const Kept& kept, bool is_first,
                         bool is_last, float scale_log2) {
    const auto unit_of = [&](int n) { return accumulators_of(output, n); };
    if (is_first) {
      merge_accumulators<C>(
          output, rows, unit_rows, scale_log2, [](int) { return float4{0.f, 0.f, 0.f, 0.f}; },
          unit_of);
    } else {
      merge_accumulators<C>(
          output, rows, unit_rows, scale_log2, [&](int n) { return kept.output(n); }, unit_of);
    }
    if (!is_last) kept.put(output);
  }

  // Merges all units of a tile, which CTAs have kept.
  FLASH_DEVICE void take_all(const DecodeLaunch& launch, int tile, int count, int warpgroup) {
    KeptUnit<C> unit(launch, tile, 0, warpgroup);
#pragma unroll 1
    for (int i = 0; i < count; ++i, unit.advance()) {
      typename W::Rows unit_rows;
      unit.get_states(unit_rows);
      merge_accumulators<C>(
          output, rows, unit_rows, launch.scale_log2,
          [&](int n) { return accumulators_of(output, n); }, [&](int n) { return unit.output(n); });
    }
  }
};

// Whether this CTA is the last of a tile's `sharers` to arrive; then it sees what all of them have
// stored.
template <DecodeConfig C>
FLASH_DEVICE bool arrives_last(uint32_t* arrivals, int sharers, int& is_last) {
  consumer_barrier<C>();
  if (ptx::read_tid_x() == 0)
    is_last = ptx::atomic_add_acq_rel(arrivals, 1) == static_cast<uint32_t>(sharers - 1);
  consumer_barrier<C>();
  return is_last;
}

}  // namespace flash::hopper
