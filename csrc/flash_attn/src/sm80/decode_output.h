// From a tile's merged units to out and softmax_lse.
#pragma once

#include "sm80/merge_units.h"
#include "warp/decode_output.h"
#include "warp/sink.h"
#include "warp/store_rows.h"

namespace flash::sm80 {

// Writes this thread's part of out and softmax_lse.
template <DecodeConfig C>
FLASH_DEVICE void store_total(const FwdParams& p, const DecodeLaunch& launch,
                              const DecodePlace<C>& here, Total<C>& total) {
  using Q = Quads<C>;
  const int row = Q::row();
  if (row >= here.rows) return;
  const int head = here.head(row);
  float unit = launch.scale, factor = 1.f;
  const float sink = sink_logit(p, head);
  if (sink != -INFINITY) factor = add_sink(total.state, unit, sink);
  factor *= total.state.inverse_sum();
  if constexpr (C.tile().warps_share_keys) factor *= launch.dropout.rescale;
  if (p.softmax_lse != nullptr && Q::column(0) == 0)
    p.softmax_lse[here.batch * p.lse_batch_stride + head * p.lse_head_stride + here.seq.lse_row +
                  here.query(row)] = total.state.lse(unit);
  char* gO = here.row_of(p.o, row);
#pragma unroll
  for (int i = 0; i < Q::kCount; ++i) {
    const float4& o = total.output[i];
    const uint2 packed{ptx::pack<C.dtype>(o.x * factor, o.y * factor),
                       ptx::pack<C.dtype>(o.z * factor, o.w * factor)};
    char* destination = gO + Q::column(i) * kElementBytes;
    const int columns = static_cast<int>(p.d_v) - Q::column(i);
    if (launch.o_aligned && columns >= 4) {
      *reinterpret_cast<uint2*>(destination) = packed;
    } else {
      store_elements(destination, {packed.x, packed.y, 0, 0}, min(columns, 4) * kElementBytes);
    }
  }
}

// Unit `unit` of this tile in the workspace.
template <DecodeConfig C>
FLASH_DEVICE Unit kept_unit(const DecodeLaunch& launch, int tile, int unit) {
  const int64_t row = (static_cast<int64_t>(tile) * launch.max_units + unit) * launch.unit_rows;
  return {launch.unit_states + row, launch.unit_outputs + row * C.head_dim_v, C.head_dim_v};
}

}  // namespace flash::sm80
