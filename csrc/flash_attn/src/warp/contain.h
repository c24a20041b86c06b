// P V where V is not finite and some keys are hidden: 0 times NaN must not reach a row that does
// not see the key.
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

}  // namespace flash
