// Rows of out of packed batches that decode kernels write beside those of sequences.
#pragma once

#include <cmath>
#include <cstdint>

#include "base/ptx/special_registers.h"
#include "warp/decode_place.h"

namespace flash {

// Rows of out that belong to no sequence become 0, their softmax_lse -inf: those of the heads of
// this CTA's group, its share of them.
template <auto C, class Params>
FLASH_DEVICE void store_rows_of_no_sequence(const Params& p, const DecodePlan& launch,
                                            const DecodePlace<C>& here) {
  const int step = launch.tiles * launch.ctas_per_tile, group = launch.group.divisor;
  const int64_t first = p.cu_seqlens_q[p.b], rows = (p.total_q - first) * group;
  if (first < 0) return;
  for (int64_t i = ptx::read_ctaid_x() % step; i < rows; i += step) {
    const int64_t row = first + i / group, head = here.head_k * group + i % group;
    auto* o = reinterpret_cast<uint16_t*>(operand_row(p.o, C.dtype, 0, row, head));
    for (int j = threadIdx.x; j < p.d_v; j += C.threads()) o[j] = 0;
    if (p.softmax_lse != nullptr && threadIdx.x == 0)
      p.softmax_lse[head * p.lse_head_stride + row] = -INFINITY;
  }
}

}  // namespace flash
