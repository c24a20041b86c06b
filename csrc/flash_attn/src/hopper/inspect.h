// Slots of V that a mask or the end of the keys cuts: a hidden key's probability is 0, and 0 times
// inf or NaN is NaN.
#pragma once

#include <cstdint>

#include "base/ptx/math.h"
#include "base/ptx/shared_memory.h"
#include "warp/smem_tile.h"

namespace flash::hopper {

// What lies behind a sequence's last key becomes 0, in a slot of `all` rows of which `rows` are the
// sequence's: thread `thread`'s share, of kThreads.
template <class V, int kThreads>
FLASH_DEVICE void clear_rows_behind(uint32_t slot, int rows, int all, int thread) {
  for (int i = rows * V::kChunks + thread; i < all * V::kChunks; i += kThreads)
#pragma unroll
    for (int g = 0; g < V::kGroups; ++g)
      ptx::store_shared(slot + g * V::kGroupBytes + i * kChunkBytes, uint4{0, 0, 0, 0});
}

// Whether this warp's share of a slot, `rows` rows, holds neither inf nor NaN: times 0 they are
// NaN.
template <Dtype kDtype, class V, int kThreads>
FLASH_DEVICE bool is_finite_share(uint32_t slot, int rows, int thread) {
  constexpr bool kIsFp8 = kDtype == Dtype::kFloat8E4M3;
  uint32_t sum = 0;
#pragma unroll 2
  for (int i = thread; i < rows * V::kChunks; i += kThreads) {
#pragma unroll
    for (int g = 0; g < V::kGroups; ++g) {
      const uint4 x = ptx::load_shared_16_bytes(slot + g * V::kGroupBytes + i * kChunkBytes);
      for (const uint32_t word : {x.x, x.y, x.z, x.w}) {
        if constexpr (kIsFp8) {
          sum |= (word & 0x7f7f7f7fu) + 0x01010101u;  // the sign of a byte that is NaN; no inf
        } else {
          sum = ptx::fma2<kDtype>(word, 0, sum);
        }
      }
    }
  }
  return __all_sync(0xffffffffu, (sum & (kIsFp8 ? 0x80808080u : 0x7fff7fffu)) == 0);
}

}  // namespace flash::hopper
