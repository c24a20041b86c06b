// As warp/contain.h, of e4m3.
#pragma once

#include <cstdint>

#include "base/ptx/fragments.h"
#include "base/ptx/math.h"
#include "base/ptx/shared_memory.h"
#include "base/ptx/special_registers.h"
#include "base/static_for.h"
#include "common/mask.h"
#include "hopper/column_of_key.h"
#include "hopper/tile_size.h"
#include "warp/contain.h"
#include "warp/warp_tile.h"

namespace flash::hopper {

FLASH_DEVICE float unpack_e4m3(uint32_t byte) {
  return unpack<Dtype::kFloat16>(ptx::unpack_e4m3(byte), 0);
}

// rO += factor rP V over the keys that each row sees, mask.keys(row), one key after another. `sV`
// is a tile Vt, V transposed.
template <FwdConfig C, class Vt>
FLASH_DEVICE void gemm_pv_in_8_bits_by_keys(typename WarpTile<C>::Output& rO,
                                            const typename WarpTile<C>::Probabilities& rP,
                                            uint32_t sV, float factor, const Mask& mask,
                                            int first_row, int first_key) {
  using W = WarpTile<C>;
  const int lane = ptx::read_tid_x() % 32;
  static_for<2>([&](auto half) {
    const ptx::Element first = ptx::accumulator_element(lane, 2 * half);
    const KeyRange keys = mask.keys(ptx::opaque(first_row) + first.row);
#pragma unroll 1
    for (int key = 0; key < C.n(); ++key) {
      uint32_t four = 0;  // by bits: a chain of selects would become an array in local memory
#pragma unroll
      for (int n = 0; n < W::kP; ++n) four |= rP[0][n][half] & (0u - (n == key / 16));
      const int column = column_of_key(key % 16);
      four = __shfl_sync(0xffffffffu, four, (lane & ~3) | column / 4);
      if (first_key + key < keys.begin || first_key + key >= keys.end) continue;
      const float p = factor * unpack_e4m3(four >> column % 4 * 8);
#pragma unroll
      for (int n = 0; n < W::kO; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t v =
              ptx::load_shared_byte(sV + Vt::offset(8 * n + first.col + i, key / 16) + column);
          float& o = rO[0][n][2 * half + i];
          o = fmaf(p, unpack_e4m3(v), o);
        }
      }
    }
  });
}

}  // namespace flash::hopper
