// From a warp's accumulators to out and softmax_lse.
#pragma once

#include <cstdint>

#include "base/ptx/fragments.h"
#include "base/ptx/math.h"
#include "base/ptx/shared_memory.h"
#include "base/ptx/special_registers.h"
#include "base/static_for.h"
#include "warp/rows.h"
#include "warp/sink.h"
#include "warp/smem_tile.h"
#include "warp/store_rows.h"
#include "warp/warp_tile.h"

namespace flash {

// Completes the rows' sums over the lanes, divides rO by them and writes softmax_lse, if wanted.
// `sink`: -inf is none. `rescale`: dropout's 1 / (1 - p).
template <auto C>
FLASH_DEVICE void normalise_o(typename WarpTile<C>::Output& rO, typename WarpTile<C>::Rows& rows,
                              float* lse, int valid_rows, float scale, float sink, float rescale) {
  using W = WarpTile<C>;
  const int lane = ptx::read_tid_x() % 32;
#pragma unroll
  for (int m = 0; m < W::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RowState& state = rows[m][half];
      state.sum = quad_sum(state.sum);
      float unit = scale, factor = rescale;
      if (sink != -INFINITY) factor *= add_sink(state, unit, sink);
      factor *= state.inverse_sum();
#pragma unroll
      for (int n = 0; n < W::kO; ++n) {
        rO[m][n][2 * half] *= factor;
        rO[m][n][2 * half + 1] *= factor;
      }
      const ptx::Element first = ptx::accumulator_element(lane, 2 * half);
      const int row = m * 16 + first.row;
      if (lse && first.col == 0 && row < valid_rows) lse[row] = state.lse(unit);
    }
  }
}

// Writes the warp's rows of out, through its own rows of a tile O in shared memory, so that
// neighbouring lanes write neighbouring 16 bytes of a row. `gO` is the warp's first row; `aligned`:
// rows start at multiples of 16 bytes.
template <auto C, class O, Dtype kDtype = C.dtype>
FLASH_DEVICE void store_o(const typename WarpTile<C>::Output& rO, uint32_t sO, char* gO,
                          int64_t row_bytes, bool aligned, int valid_rows, int head_dim) {
  using W = WarpTile<C>;
  const int lane = ptx::read_tid_x() % 32;
#pragma unroll
  for (int m = 0; m < W::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const ptx::Element first = ptx::accumulator_element(lane, 2 * half);
      const uint32_t row = sO + first.col * kElementBytes + O::offset(first.row, 0);
      static_for<W::kO>([&](auto n) {
        constexpr int kPair = n / 2;
        ptx::store_shared((row ^ (O::flip(kPair) | n % 2 * kChunkBytes)) + O::ahead(kPair) +
                              m * 16 * O::kRowBytes,
                          ptx::pack<kDtype>(rO[m][n][2 * half], rO[m][n][2 * half + 1]));
      });
    }
  }
  __syncwarp();
  store_rows<O, 32>(sO, gO, row_bytes, aligned, valid_rows, head_dim, lane);
}

}  // namespace flash
