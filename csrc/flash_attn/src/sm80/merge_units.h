// From units' results to out and softmax_lse.
//
// A unit's result is a state and an unnormalised output for each row. The threads of a CTA share
// rows and columns out among themselves and merge unit after unit into registers: the same
// arithmetic whether a unit comes from shared memory or, computed by another CTA, from the
// workspace.
#pragma once

#include "base/ptx/atomic.h"
#include "base/ptx/fragments.h"
#include "base/ptx/special_registers.h"
#include "base/static_for.h"
#include "sm80/decode_params.h"
#include "sm80/decode_smem.h"
#include "warp/rows.h"

namespace flash::sm80 {

// A unit's result, wherever it lies.
struct Unit {
  RowState* states;  // [row]
  float* outputs;    // [row, column]
  int row_stride;    // of outputs

  // To the unit `rows` rows further on.
  FLASH_DEVICE void skip(int rows) {
    states += rows;
    outputs += rows * row_stride;
  }
};

// What a thread takes care of: some quads of columns of one row.
template <DecodeConfig C>
struct Quads {
  static constexpr int kThreadsOfRow = C.threads() / kDecodeRows;
  static constexpr int kCount = C.head_dim_v / (4 * kThreadsOfRow);

  FLASH_DEVICE static int row() { return ptx::read_tid_x() / kThreadsOfRow; }
  FLASH_DEVICE static int column(int i) {
    return (ptx::read_tid_x() % kThreadsOfRow + i * kThreadsOfRow) * 4;
  }
  FLASH_DEVICE static float4& of(const Unit& unit, int i) {
    return *reinterpret_cast<float4*>(unit.outputs + row() * unit.row_stride + column(i));
  }
};

// This thread's part of the units merged so far.
template <DecodeConfig C>
struct Total {
  RowState state{-INFINITY, 0.f};
  float4 output[Quads<C>::kCount] = {};

  // Merges in the next unit; rows from `rows` on are left out.
  FLASH_DEVICE void take(const Unit& unit, int rows, float scale_log2) {
    using Q = Quads<C>;
    if (Q::row() >= rows) return;
    const MergeFactors factors =
        merge(state, unit.states[Q::row()], [=](float x) { return ptx::ex2(x * scale_log2); });
#pragma unroll
    for (int i = 0; i < Q::kCount; ++i) {
      const float4 x = Q::of(unit, i);
      float4& sum = output[i];
      sum.x = fmaf(x.x, factors.part, sum.x * factors.total);
      sum.y = fmaf(x.y, factors.part, sum.y * factors.total);
      sum.z = fmaf(x.z, factors.part, sum.z * factors.total);
      sum.w = fmaf(x.w, factors.part, sum.w * factors.total);
    }
  }
};

// Keeps a unit in the workspace.
template <DecodeConfig C>
FLASH_DEVICE void store_unit(const Unit& to, const Unit& unit, int rows) {
  using Q = Quads<C>;
  if (Q::row() >= rows) return;
#pragma unroll
  for (int i = 0; i < Q::kCount; ++i) Q::of(to, i) = Q::of(unit, i);
  if (Q::column(0) == 0) to.states[Q::row()] = unit.states[Q::row()];
}

// Whether this CTA is the last of a tile's `sharers` to arrive; then it sees what all of them have
// stored.
FLASH_DEVICE bool arrives_last(uint32_t* arrivals, int sharers, int& is_last) {
  __syncthreads();
  if (threadIdx.x == 0)
    is_last = ptx::atomic_add_acq_rel(arrivals, 1) == static_cast<uint32_t>(sharers - 1);
  __syncthreads();
  return is_last;
}

// Sums up the warps' outputs of a unit, each warp's to its own maxima, as one unit in shared
// memory. Every warp adds another part of the columns at a time.
template <DecodeConfig C>
class WarpSum {
 public:
  FLASH_DEVICE WarpSum(SmemPlan<C>& plan, int warp, int lane)
      : plan_(plan), warp_(warp), lane_(lane) {}

  FLASH_DEVICE void operator()(typename WarpTile<C>::Output& rO, typename WarpTile<C>::Rows& rows,
                               float scale_log2) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RowState& state = rows[0][half];
      state.sum = quad_sum(state.sum);
      if (lane_ % 4 != 0) continue;
      plan_.warp_max[warp_][row(half)] = state.max;
      plan_.warp_sum[warp_][row(half)] = state.sum;
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) scale_to_unit(rO, half, rows[0][half].max, scale_log2);
#pragma unroll 1
    for (int step = 0; step < kWarps; ++step) {
      add_part(rO, (warp_ + step) % kWarps, step > 0);
      __syncthreads();
    }
  }

 private:
  static constexpr int kWarps = C.tile().warps;

  FLASH_DEVICE int row(int half) const { return ptx::accumulator_element(lane_, 2 * half).row; }

  // Scales this warp's output to the unit's maximum.
  FLASH_DEVICE void scale_to_unit(typename WarpTile<C>::Output& rO, int half, float max,
                                  float scale_log2) const {
    RowState unit{-INFINITY, 0.f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) unit.max = fmaxf(unit.max, plan_.warp_max[w][row(half)]);
    const auto factor_of = [&](float x) { return ptx::ex2((x - unit.anchor()) * scale_log2); };
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float factor = factor_of(plan_.warp_max[w][row(half)]);
      unit.sum = fmaf(plan_.warp_sum[w][row(half)], factor, unit.sum);
    }
    if (warp_ == 0 && lane_ % 4 == 0) plan_.states[row(half)] = unit;
    const float factor = factor_of(max);
#pragma unroll
    for (int n = 0; n < WarpTile<C>::kO; ++n) {
      rO[0][n][2 * half] *= factor;
      rO[0][n][2 * half + 1] *= factor;
    }
  }

  FLASH_DEVICE void add_part(const typename WarpTile<C>::Output& rO, int part, bool adds) const {
    constexpr int kTiles = WarpTile<C>::kO / kWarps;
    static_for<kWarps>([&](auto candidate) {
      if (part != candidate) return;
#pragma unroll
      for (int n = candidate * kTiles; n < (candidate + 1) * kTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column = n * 8 + ptx::accumulator_element(lane_, 0).col;
          auto& place = *reinterpret_cast<float2*>(&plan_.output[row(half)][column]);
          float2 x{rO[0][n][2 * half], rO[0][n][2 * half + 1]};
          if (adds) x = {place.x + x.x, place.y + x.y};
          place = x;
        }
      }
    });
  }

  SmemPlan<C>& plan_;
  int warp_, lane_;
};

}  // namespace flash::sm80
