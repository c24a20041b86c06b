// Products where an operand is not finite and some keys are hidden: 0 times NaN must not reach
// a row that does not see the key.
#pragma once

#include <cstdint>

#include "base/ptx/elements.h"
#include "base/ptx/fragments.h"
#include "base/ptx/math.h"
#include "base/ptx/shared_memory.h"
#include "base/ptx/special_registers.h"
#include "base/static_for.h"
#include "common/mask.h"
#include "warp/smem_tile.h"
#include "warp/warp_tile.h"

namespace flash {

template <Dtype kDtype>
FLASH_DEVICE float unpack(uint32_t pair, int i) {
  return ptx::to_float<kDtype>(static_cast<uint16_t>(i == 0 ? pair : pair >> 16));
}

// Whether a warp's columns of a tile of V hold neither inf nor NaN. It reads them all: times 0 they
// are NaN.
template <auto C>
FLASH_DEVICE bool is_finite(uint32_t sV) {
  uint32_t sum = 0;
#pragma unroll 4
  for (int i = ptx::read_tid_x() % 32; i < C.tile().n * C.warp_columns() / kChunkElements;
       i += 32) {
    const uint4 x = ptx::load_shared_16_bytes(sV + i * kChunkBytes);
    for (const uint32_t pair : {x.x, x.y, x.z, x.w}) sum = ptx::fma2<C.dtype>(pair, 0, sum);
  }
  const bool is_zero = unpack<C.dtype>(sum, 0) == 0.f && unpack<C.dtype>(sum, 1) == 0.f;
  return __all_sync(0xffffffffu, is_zero);
}

// rO += rP V over the keys that each row sees, mask.keys(row), one key after another. `sV` is a
// tile V from the warp's columns on.
template <auto C, class V, class RowMask>
FLASH_DEVICE void gemm_pv_by_keys(typename WarpTile<C>::Output& rO,
                                  const typename WarpTile<C>::Probabilities& rP, uint32_t sV,
                                  const RowMask& mask, int first_row, int first_key) {
  using W = WarpTile<C>;
  const int lane = ptx::read_tid_x() % 32;
  static_for<W::kM * 2>([&](auto row_of_lane) {
    constexpr int m = row_of_lane / 2, half = row_of_lane % 2;
    const ptx::Element first = ptx::accumulator_element(lane, 2 * half);
    const KeyRange keys = mask.keys(ptx::opaque(first_row) + m * 16 + first.row);
#pragma unroll 1
    for (int key = 0; key < C.tile().n; ++key) {
      uint32_t pair = 0;  // by bits: a chain of selects would become an array in local memory
#pragma unroll
      for (int n = 0; n < W::kS; ++n) pair |= rP[m][n][half] & (0u - (n == key / 8));
      pair = __shfl_sync(0xffffffffu, pair, (lane & ~3) | key % 8 / 2);
      if (first_key + key < keys.begin || first_key + key >= keys.end) continue;
      const float p = unpack<C.dtype>(pair, key % 2);
#pragma unroll
      for (int n = 0; n < W::kO; ++n) {
        const uint32_t v = ptx::load_shared(sV + V::offset(key, n) + first.col * kElementBytes);
        float* o = &rO[m][n][2 * half];
        o[0] = fmaf(p, unpack<C.dtype>(v, 0), o[0]);
        o[1] = fmaf(p, unpack<C.dtype>(v, 1), o[1]);
      }
    }
  });
}

// Whether a tile holds neither inf nor NaN, as far as this thread's share of it tells.
template <class Smem, Dtype kDtype, int kThreads>
FLASH_DEVICE bool is_share_finite(uint32_t tile) {
  uint32_t sum = 0;  // of zeros, or NaN
#pragma unroll 2
  for (int i = threadIdx.x; i < Smem::kBytes / kChunkBytes; i += kThreads) {
    const uint4 x = ptx::load_shared_16_bytes(tile + i * kChunkBytes);
    for (const uint32_t pair : {x.x, x.y, x.z, x.w}) sum = ptx::fma2<kDtype>(pair, 0, sum);
  }
  return ptx::to_float<kDtype>(static_cast<uint16_t>(sum)) == 0.f &&
         ptx::to_float<kDtype>(static_cast<uint16_t>(sum >> 16)) == 0.f;
}

// r += sums over `count` terms: of a lane's row row_of(i) and term t, for which is_seen(row, t),
// the element score_at(row, t) times the pair at pair_at(t, n). Addresses are computed each time:
// what this holds, the loop around it has to do without.
template <Dtype kDtype, int kM, int kN, class RowOf, class IsSeen, class ScoreAt, class PairAt>
FLASH_DEVICE void multiply_by_element(float (&r)[kM][kN][4], int count, const RowOf& row_of,
                                      const IsSeen& is_seen, const ScoreAt& score_at,
                                      const PairAt& pair_at) {
  static_for<kM * 2>([&](auto i) {
#pragma unroll 1
    for (int t = 0; t < count; ++t) {
      const int row = ptx::opaque(row_of(i));
      if (!is_seen(row, t)) continue;
      const float x = ptx::to_float<kDtype>(ptx::load_shared_2_bytes(score_at(row, t)));
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const uint32_t pair = ptx::load_shared(pair_at(ptx::opaque(t), n));
        float* sum = &r[i / 2][n][2 * (i % 2)];
        sum[0] = fmaf(x, ptx::to_float<kDtype>(static_cast<uint16_t>(pair)), sum[0]);
        sum[1] = fmaf(x, ptx::to_float<kDtype>(static_cast<uint16_t>(pair >> 16)), sum[1]);
      }
    }
  });
}

// Of a 16-bit element or pair of them.
template <class Smem>
FLASH_DEVICE uint32_t element_address(uint32_t tile, int row, int column) {
  return tile + Smem::offset(row, column / kChunkElements) +
         column % kChunkElements * kElementBytes;
}

}  // namespace flash
