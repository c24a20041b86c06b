// Dropout's keep decisions: a pure function of (seed, offset, batch, head, query, key), equal on
// every backend.
//
// Philox-4x32-7 (Salmon et al., SC'11) makes 16 bytes a call. A call serves the 16 scores that one
// thread holds in four neighbouring m16n8k16 accumulator fragments (PTX ISA, "Matrix Fragments for
// mma.m16n8k16"): with lane = 4 * (row % 8) + (column % 8) / 2 of a 16 x 32 block of scores, 32-bit
// word t covers columns 8 t .. 8 t + 7, and its bytes are (row half 0, column parity 0), (0, 1),
// (1, 0), (1, 1). A score is kept where its byte <= floor((1 - p) * 255).
#pragma once

#include <cstdint>

#include "base/philox.h"

namespace flash {

struct Dropout {
  uint64_t seed = 0, offset = 0;
  uint32_t keep_threshold = 255;  // a byte above it drops the score
  float rescale = 1.f;            // 1 / (1 - p)
  bool enabled = false;

  FLASH_INLINE static Dropout make(float p, uint64_t seed, uint64_t offset) {
    Dropout d;
    d.seed = seed;
    d.offset = offset;
    d.enabled = p > 0.f;
    d.keep_threshold = static_cast<uint32_t>(static_cast<double>(1.f - p) * 255.0);
    d.rescale = 1.f / (1.f - p);
    return d;
  }

  // The 16 bytes of lane `column_pair` (0..3 within each 8 columns) for the row pair (query, query
  // ^ 8).
  template <class Multiply = MultiplyWide>
  FLASH_INLINE Philox4 random(uint32_t batch_head, uint32_t query, uint32_t column_block32,
                              uint32_t column_pair, const Multiply& multiply = {}) const {
    const uint32_t row_pair = query / 16 * 8 + query % 8;
    const Philox4 counter = {
        {column_block32 * 4 + column_pair, row_pair, batch_head, static_cast<uint32_t>(offset)}};
    return philox_4x32_7(seed ^ (offset >> 32 << 32), counter, multiply);
  }

  // Bytes of one query's scores for the 32 keys of a column block, in key order.
  FLASH_INLINE void row_bytes(uint32_t batch_head, uint32_t query, uint32_t column_block32,
                              uint8_t* bytes) const {
    const int shift = query / 8 % 2 * 16;
    for (uint32_t pair = 0; pair < 4; ++pair) {
      const Philox4 r = random(batch_head, query, column_block32, pair);
      for (int t = 0; t < 4; ++t) {
        bytes[8 * t + 2 * pair] = static_cast<uint8_t>(r.x[t] >> shift);
        bytes[8 * t + 2 * pair + 1] = static_cast<uint8_t>(r.x[t] >> (shift + 8));
      }
    }
  }
};

}  // namespace flash
