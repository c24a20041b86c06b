// Accumulators to shared memory, in 16 bits.
#pragma once

#include "base/ptx/elements.h"
#include "base/ptx/fragments.h"
#include "base/ptx/shared_memory.h"
#include "base/ptx/special_registers.h"
#include "base/static_for.h"
#include "warp/warp_tile.h"

namespace flash::hopper {

// A warp's rows of a tile O, the first at `rows`. A lane addresses the row of 16 bytes that holds
// its row of four 8 x 8 blocks.
template <auto C, class O, Dtype kDtype = C.dtype>
FLASH_DEVICE void accumulators_to_shared(uint32_t rows, const typename WarpTile<C>::Output& rO) {
  const ptx::Chunk chunk = ptx::a_chunk(ptx::read_tid_x() % 32);
  const uint32_t lane = rows + O::offset(chunk.row, chunk.chunk);
  static_for<WarpTile<C>::kO / 2>([&](auto pair) {
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&o)[4] = rO[0][2 * pair + i / 2];
      r[i] = ptx::pack<kDtype>(o[i % 2 * 2], o[i % 2 * 2 + 1]);
    }
    ptx::stmatrix_x4<O::ahead(pair)>(lane ^ O::flip(pair), r);
  });
}

}  // namespace flash::hopper
