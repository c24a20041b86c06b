// Rotary embedding of queries and of new keys.
#pragma once

#include <cstdint>

#include "base/ptx/elements.h"
#include "base/ptx/shared_memory.h"
#include "common/flash.h"
#include "warp/smem_tile.h"

namespace flash {

// Rotary embedding (RoFormer, arXiv:2104.09864) of the pair of elements x0, x1 of a row at
// `position`: angle `i` of rotary_dim / 2.
template <Dtype kDtype>
FLASH_DEVICE void rotate(const AppendParams& p, int64_t position, int i, uint16_t& x0,
                         uint16_t& x1) {
  const auto* cos = static_cast<const uint16_t*>(p.rotary_cos);
  const auto* sin = static_cast<const uint16_t*>(p.rotary_sin);
  const float c = ptx::to_float<kDtype>(cos[position * p.rotary_cos_row_stride + i]);
  const float s = ptx::to_float<kDtype>(sin[position * p.rotary_sin_row_stride + i]);
  const float a = ptx::to_float<kDtype>(x0), b = ptx::to_float<kDtype>(x1);
  x0 = ptx::from_float<kDtype>(a * c - b * s);
  x1 = ptx::from_float<kDtype>(a * s + b * c);
}

// Where the elements of angle `i` lie in a row.
struct RotaryPair {
  int first, second;
};
FLASH_DEVICE RotaryPair rotary_pair(const AppendParams& p, int i) {
  if (p.is_rotary_interleaved) return {2 * i, 2 * i + 1};
  return {i, i + static_cast<int>(p.rotary_dim / 2)};
}

// Rotates the first `rows` rows of a tile of Q in shared memory, by kThreads threads, of which this
// is `thread`. position_of(row) is a row's position.
template <Dtype kDtype, class Smem, int kThreads, class PositionOf>
FLASH_DEVICE void rotate_q(const AppendParams& p, uint32_t sQ, int rows, int thread,
                           const PositionOf& position_of) {
  const int half = static_cast<int>(p.rotary_dim / 2);
  const auto address = [&](int row, int column) {
    return sQ + Smem::offset(row, column / kChunkElements) +
           column % kChunkElements * kElementBytes;
  };
  for (int n = thread; n < rows * half; n += kThreads) {
    const int row = n / half, i = n % half;
    const RotaryPair pair = rotary_pair(p, i);
    const uint32_t first = address(row, pair.first), second = address(row, pair.second);
    uint16_t x0 = ptx::load_shared_2_bytes(first), x1 = ptx::load_shared_2_bytes(second);
    rotate<kDtype>(p, position_of(row), i, x0, x1);
    ptx::store_shared(first, x0);
    ptx::store_shared(second, x1);
  }
}

}  // namespace flash
