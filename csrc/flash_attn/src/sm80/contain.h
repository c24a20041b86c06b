// P V where V is not finite and some keys are hidden: 0 times NaN must not reach a row that does
// not see the key.
#pragma once

#include "base/ptx/special_registers.h"
#include "sm80/query.h"
#include "sm80/steps.h"

namespace flash::sm80 {

// Whether a tile of V holds inf or NaN. The warp reads all of it.
template <auto C>
FLASH_DEVICE bool is_finite(uint32_t sV) {
  constexpr uint32_t kExponent = C.dtype == Dtype::kFloat16 ? 0x7c00u : 0x7f80u;
  // Adding one to a full exponent carries into the sign bit, which the masks leave 0.
  constexpr uint32_t kMask = kExponent * 0x10001u;
  constexpr uint32_t kOne = (kExponent & -kExponent) * 0x10001u;
  uint32_t full = 0;
#pragma unroll 4
  for (int i = ptx::read_tid_x() % 32; i < SmemPlan<C>::V::kBytes / kChunkBytes; i += 32) {
    const uint4 x = ptx::load_shared_16_bytes(sV + i * kChunkBytes);
    full |= ((x.x & kMask) + kOne) | ((x.y & kMask) + kOne);
    full |= ((x.z & kMask) + kOne) | ((x.w & kMask) + kOne);
  }
  return !__any_sync(0xffffffffu, (full & 0x80008000u) != 0);
}

template <Dtype kDtype>
FLASH_DEVICE float unpack(uint32_t pair, int i) {
  return to_float<kDtype>(static_cast<uint16_t>(i == 0 ? pair : pair >> 16));
}

// rO += rP V over the keys that each row sees, mask.keys(row), one key after another. `sV` is the
// tile.
template <auto C, class RowMask>
FLASH_DEVICE void gemm_pv_by_keys(typename WarpTile<C>::Output& rO,
                                  const typename WarpTile<C>::Probabilities& rP, uint32_t sV,
                                  const RowMask& mask, int first_row, int first_key) {
  using W = WarpTile<C>;
  using V = typename SmemPlan<C>::V;
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

}  // namespace flash::sm80
