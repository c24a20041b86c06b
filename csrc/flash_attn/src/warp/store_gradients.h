// Gradients' ways to memory that are the same on every device.
#pragma once

#include "base/ptx/special_registers.h"
#include "warp/key_tile.h"
#include "warp/smem_tile.h"

namespace flash {

// Two neighbouring elements of a row of dq, of which `columns` are left.
FLASH_DEVICE void store_pair(char* destination, uint32_t pair, int columns, bool aligned) {
  if (aligned && columns >= 2) {
    *reinterpret_cast<uint32_t*>(destination) = pair;
    return;
  }
  auto* elements = reinterpret_cast<uint16_t*>(destination);
  if (columns >= 1) elements[0] = static_cast<uint16_t>(pair);
  if (columns >= 2) elements[1] = static_cast<uint16_t>(pair >> 16);
}

// Zeros for keys of no sequence, this CTA's share of them.
template <Dtype kDtype, int kThreads>
FLASH_DEVICE void clear_rows_of_no_sequence(const BwdParams& p, const KeyTile& here) {
  const int64_t first = p.cu_seqlens_k[p.b];
  if (first < 0) return;
  const auto clear_row = [&](const Operand& x, int64_t row, int64_t head_dim) {
    auto* elements = reinterpret_cast<uint16_t*>(operand_row(x, kDtype, 0, row, here.head_k));
    for (int i = threadIdx.x; i < head_dim; i += kThreads) elements[i] = 0;
  };
  for (int64_t row = first + here.place.m_block; row < p.total_k; row += here.place.others) {
    clear_row(p.dk, row, p.d);
    clear_row(p.dv, row, p.d_v);
  }
}

}  // namespace flash
