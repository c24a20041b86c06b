// Q's sign.
#pragma once

#include "base/ptx/shared_memory.h"
#include "base/ptx/special_registers.h"
#include "warp/smem_tile.h"

namespace flash {

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

}  // namespace flash
