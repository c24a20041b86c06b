// From accumulators to out and softmax_lse.
#pragma once

#include <cstdint>

#include "common/flash.h"
#include "common/seqlen.h"
#include "sm80/steps.h"

namespace flash::sm80 {

// Completes the rows' sums over the lanes, divides rO by them and writes softmax_lse, if wanted.
template <FwdConfig C>
FLASH_DEVICE void normalise_o(typename WarpTile<C>::Output& rO, typename WarpTile<C>::Rows& rows,
                              float* lse, int valid_rows, float scale) {
  using W = WarpTile<C>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < W::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RowState& state = rows[m][half];
      state.sum = quad_sum(state.sum);
      const float inverse_sum = state.inverse_sum();
#pragma unroll
      for (int n = 0; n < W::kO; ++n) {
        rO[m][n][2 * half] *= inverse_sum;
        rO[m][n][2 * half + 1] *= inverse_sum;
      }
      const ptx::Element first = ptx::accumulator_element(lane, 2 * half);
      const int row = m * 16 + first.row;
      if (lse && first.col == 0 && row < valid_rows) lse[row] = state.lse(scale);
    }
  }
}

// Writes the warp's rows of out, through its own rows of shared memory, so that neighbouring lanes
// write neighbouring 16 bytes of a row. `gO` is the warp's first row.
template <FwdConfig C>
FLASH_DEVICE void store_o(const typename WarpTile<C>::Output& rO, uint32_t sO, char* gO,
                          int64_t row_bytes, int valid_rows, int head_dim) {
  using W = WarpTile<C>;
  using Smem = SmemTile<C.head_dim>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < W::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const ptx::Element first = ptx::accumulator_element(lane, 2 * half);
      const uint32_t row = sO + first.col * kElementBytes + Smem::offset(first.row, 0);
#pragma unroll
      for (int n = 0; n < W::kO; ++n)
        ptx::store_shared((row ^ (n * kChunkBytes)) + m * 16 * W::kRowBytes,
                          ptx::pack<C.dtype>(rO[m][n][2 * half], rO[m][n][2 * half + 1]));
    }
  }
  __syncwarp();
  constexpr int kRowStep = 32 / Smem::kChunks;
  const int chunk = lane % Smem::kChunks;
  for (int row = lane / Smem::kChunks; row < valid_rows; row += kRowStep) {
    const uint4 x = ptx::load_shared_16_bytes(sO + Smem::offset(row, chunk));
    if (chunk * kChunkElements < head_dim)
      *reinterpret_cast<uint4*>(gO + row * row_bytes + chunk * kChunkBytes) = x;
  }
}

}  // namespace flash::sm80
