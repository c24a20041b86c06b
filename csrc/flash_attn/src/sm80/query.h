// What happens to a tile of Q in shared memory before the first product.
#pragma once

#include "base/ptx/elements.h"
#include "base/ptx/shared_memory.h"
#include "common/flash.h"
#include "warp/rotary.h"
#include "warp/smem_tile.h"

namespace flash::sm80 {

using ptx::from_float;
using ptx::to_float;

// Negates this thread's own copies of Q, for a negative scale: the maximum of scale * score is then
// that of the scores.
template <class Smem, int kRows, int kThreads>
FLASH_DEVICE void negate_q(uint32_t sQ) {
  for (int i = threadIdx.x; i < Smem::kBytes / kChunkBytes; i += kThreads) {
    const uint32_t address = sQ + i * kChunkBytes;
    uint4 x = ptx::load_shared_16_bytes(address);
    x.x ^= 0x80008000u;
    x.y ^= 0x80008000u;
    x.z ^= 0x80008000u;
    x.w ^= 0x80008000u;
    ptx::store_shared(address, x);
  }
}

}  // namespace flash::sm80
