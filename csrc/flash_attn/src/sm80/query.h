// What happens to a tile of Q in shared memory before the first product.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "base/ptx/elements.h"
#include "base/ptx/shared_memory.h"
#include "common/flash.h"
#include "common/seqlen.h"
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

// Rotary embedding (RoFormer, arXiv:2104.09864) of the pair of elements x0, x1 of a row at
// `position`: angle `i` of rotary_dim / 2.
template <Dtype kDtype>
FLASH_DEVICE void rotate(const AppendParams& p, int64_t position, int i, uint16_t& x0,
                         uint16_t& x1) {
  const auto* cos = static_cast<const uint16_t*>(p.rotary_cos);
  const auto* sin = static_cast<const uint16_t*>(p.rotary_sin);
  const float c = to_float<kDtype>(cos[position * p.rotary_cos_row_stride + i]);
  const float s = to_float<kDtype>(sin[position * p.rotary_sin_row_stride + i]);
  const float a = to_float<kDtype>(x0), b = to_float<kDtype>(x1);
  x0 = from_float<kDtype>(a * c - b * s);
  x1 = from_float<kDtype>(a * s + b * c);
}

// Where the elements of angle `i` lie in a row.
struct RotaryPair {
  int first, second;
};
FLASH_DEVICE RotaryPair rotary_pair(const AppendParams& p, int i) {
  if (p.is_rotary_interleaved) return {2 * i, 2 * i + 1};
  return {i, i + static_cast<int>(p.rotary_dim / 2)};
}

// Rotates the first `rows` rows of Q. position_of(row) is a row's position.
template <Dtype kDtype, class Smem, int kThreads, class PositionOf>
FLASH_DEVICE void rotate_q(const AppendParams& p, uint32_t sQ, int rows,
                           const PositionOf& position_of) {
  const int half = static_cast<int>(p.rotary_dim / 2);
  const auto address = [&](int row, int column) {
    return sQ + Smem::offset(row, column / kChunkElements) +
           column % kChunkElements * kElementBytes;
  };
  for (int n = threadIdx.x; n < rows * half; n += kThreads) {
    const int row = n / half, i = n % half;
    const RotaryPair pair = rotary_pair(p, i);
    const uint32_t first = address(row, pair.first), second = address(row, pair.second);
    uint16_t x0 = ptx::load_shared_2_bytes(first), x1 = ptx::load_shared_2_bytes(second);
    rotate<kDtype>(p, position_of(row), i, x0, x1);
    ptx::store_shared(first, x0);
    ptx::store_shared(second, x1);
  }
}

}  // namespace flash::sm80
