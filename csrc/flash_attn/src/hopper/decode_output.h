// From a tile's merged units to out and softmax_lse.
#pragma once

#include "base/ptx/shared_memory.h"
#include "hopper/decode_merge.h"
#include "hopper/softmax.h"
#include "hopper/to_shared.h"
#include "warp/decode_output.h"
#include "warp/sink.h"
#include "warp/store_rows.h"

namespace flash::hopper {

// Divides rows by their sums and writes softmax_lse.
template <DecodeConfig C>
FLASH_DEVICE void normalise(const FwdParams& p, const DecodeLaunch& launch,
                            const DecodePlace<C>& here, DecodeTotal<C>& total, int warp_row,
                            bool writes_lse) {
  constexpr float kHeadroomFactor = 1 << static_cast<int>(kHeadroom<C.dtype>);
  const int lane = ptx::read_tid_x() % 32;
  float factors[2] = {0.f, 0.f};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const ptx::Element first = ptx::accumulator_element(lane, 2 * half);
    const int row = warp_row + first.row;
    if (row >= here.rows) continue;
    const int head = here.head(row);
    RowState state = total.rows[0][half];
    state.sum *= kHeadroomFactor;
    float unit = launch.scale;
    factors[half] = kHeadroomFactor;
    const float sink = sink_logit(p, head);
    if (sink != -INFINITY) factors[half] *= add_sink(state, unit, sink);
    factors[half] *= state.inverse_sum();
    if (writes_lse && p.softmax_lse != nullptr && first.col == 0)
      p.softmax_lse[here.batch * p.lse_batch_stride + head * p.lse_head_stride + here.seq.lse_row +
                    here.query(row)] = state.lse(unit);
  }
  multiply_rows<C>(total.output, factors);
}

// Writes this warp's rows, through where Q was, which all have left.
template <DecodeConfig C>
FLASH_DEVICE void store_total(const FwdParams& p, const DecodeLaunch& launch,
                              const DecodePlace<C>& here, DecodeTotal<C>& total,
                              DecodeSmem<C>& smem, int warpgroup) {
  using O = typename DecodeSmem<C>::O;
  const int lane = ptx::read_tid_x() % 32, warp_row = ptx::read_tid_x() / 32 % 4 * 16;
  normalise<C>(p, launch, here, total, warp_row, warpgroup == 0);
  consumer_barrier<C>();
  const uint32_t rows =
      ptx::shared_address(smem.q) + warpgroup * O::kBytes + warp_row * O::kRowBytes;
  accumulators_to_shared<C, O>(rows, total.output);
  __syncwarp();
  const int first_column = warpgroup * C.warp_columns();
  store_rows<O, 32>(rows, launch.o_aligned, min(16, here.rows - warp_row),
                    static_cast<int>(p.d_v) - first_column, lane, [&](int row) {
                      return here.row_of(p.o, warp_row + row) + first_column * kElementBytes;
                    });
}

}  // namespace flash::hopper
