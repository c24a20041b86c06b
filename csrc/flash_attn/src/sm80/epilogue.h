// From accumulators to out and softmax_lse.
#pragma once

#include <cstdint>

#include "common/flash.h"
#include "common/seqlen.h"
#include "sm80/query.h"
#include "sm80/steps.h"

namespace flash::sm80 {

// -inf without sinks.
FLASH_DEVICE float sink_logit(const ScoreParams& p, int head) {
  if (p.s_aux == nullptr) return -INFINITY;
  const int64_t index = head * p.s_aux_stride;
  switch (p.s_aux_dtype) {
    case Dtype::kFloat16:
      return to_float<Dtype::kFloat16>(static_cast<const uint16_t*>(p.s_aux)[index]);
    case Dtype::kBFloat16:
      return to_float<Dtype::kBFloat16>(static_cast<const uint16_t*>(p.s_aux)[index]);
    default:
      return static_cast<const float*>(p.s_aux)[index];
  }
}

// Takes in a sink, a key without value whose logit is `sink`, of any size. `scale` is that of the
// state's scores. Returns what the row's output must be multiplied by.
FLASH_DEVICE float add_sink(RowState& state, float& scale, float sink) {
  RowState natural{state.max == -INFINITY ? -INFINITY : state.max * scale, state.sum};
  const MergeFactors factors =
      merge(natural, RowState{sink, 1.f}, [](float x) { return __expf(x); });
  state = natural;
  scale = 1.f;
  return factors.total;
}

// Completes the rows' sums over the lanes, divides rO by them and writes softmax_lse, if wanted.
// `sink`: -inf is none. `rescale`: dropout's 1 / (1 - p).
template <FwdConfig C>
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

// The first `bytes` of 16.
FLASH_DEVICE void store_elements(char* destination, const uint4& x, int bytes) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < kChunkElements; ++i) {
    if (i * kElementBytes < bytes)
      *reinterpret_cast<uint16_t*>(destination + i * kElementBytes) =
          static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
  }
}

// Copies the first `rows` rows of a tile in shared memory to memory, from `global` on; neighbouring
// ones of kThreads threads write neighbouring 16 bytes of a row. `aligned`: rows start at multiples
// of 16 bytes.
template <class Smem, int kThreads>
FLASH_DEVICE void store_rows(uint32_t shared, char* global, int64_t row_bytes, bool aligned,
                             int rows, int head_dim, int thread) {
  constexpr int kRowStep = kThreads / Smem::kChunks;
  const int chunk = thread % Smem::kChunks;
  for (int row = thread / Smem::kChunks; row < rows; row += kRowStep) {
#pragma unroll
    for (int g = 0; g < Smem::kGroups; ++g) {
      const int column = g * Smem::kGroupCols + chunk * kChunkElements;
      const uint4 x =
          ptx::load_shared_16_bytes(shared + Smem::offset(row, chunk) + g * Smem::kGroupBytes);
      char* destination = global + row * row_bytes + column * kElementBytes;
      if (aligned && column + kChunkElements <= head_dim) {
        *reinterpret_cast<uint4*>(destination) = x;
      } else {
        store_elements(destination, x, (head_dim - column) * kElementBytes);
      }
    }
  }
}

// Writes the warp's rows of out, through its own rows of shared memory, so that neighbouring lanes
// write neighbouring 16 bytes of a row. `gO` is the warp's first row; `aligned`: rows start at
// multiples of 16 bytes.
template <FwdConfig C>
FLASH_DEVICE void store_o(const typename WarpTile<C>::Output& rO, uint32_t sO, char* gO,
                          int64_t row_bytes, bool aligned, int valid_rows, int head_dim) {
  using W = WarpTile<C>;
  using O = typename SmemPlan<C>::O;
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
                          ptx::pack<C.dtype>(rO[m][n][2 * half], rO[m][n][2 * half + 1]));
      });
    }
  }
  __syncwarp();
  store_rows<O, 32>(sO, gO, row_bytes, aligned, valid_rows, head_dim, lane);
}

}  // namespace flash::sm80
