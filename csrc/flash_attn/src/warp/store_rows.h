// Shared to global memory.
#pragma once

#include <cstdint>

#include "base/ptx/shared_memory.h"
#include "warp/smem_tile.h"

namespace flash {

// The first `bytes` of 16.
FLASH_DEVICE void store_elements(char* destination, const uint4& x, int bytes) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < kChunkElements; ++i) {
    if (i * kElementBytes < bytes)
      *reinterpret_cast<uint16_t*>(destination + i * kElementBytes) =
          static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
  }
}

// Copies the first `rows` rows of a tile in shared memory to memory, row r to row_at(r);
// neighbouring ones of kThreads threads write neighbouring 16 bytes of a row. `aligned`: rows start
// at multiples of 16 bytes.
template <class Smem, int kThreads, class RowAt>
FLASH_DEVICE void store_rows(uint32_t shared, bool aligned, int rows, int head_dim, int thread,
                             const RowAt& row_at) {
  constexpr int kRowStep = kThreads / Smem::kChunks;
  const int chunk = thread % Smem::kChunks;
  for (int row = thread / Smem::kChunks; row < rows; row += kRowStep) {
    char* const first = row_at(row);
#pragma unroll
    for (int g = 0; g < Smem::kGroups; ++g) {
      const int column = g * Smem::kGroupCols + chunk * kChunkElements;
      const uint4 x =
          ptx::load_shared_16_bytes(shared + Smem::offset(row, chunk) + g * Smem::kGroupBytes);
      char* destination = first + column * kElementBytes;
      if (aligned && column + kChunkElements <= head_dim) {
        *reinterpret_cast<uint4*>(destination) = x;
      } else {
        store_elements(destination, x, (head_dim - column) * kElementBytes);
      }
    }
  }
}

// The same to rows that are row_bytes apart, from `global` on.
template <class Smem, int kThreads>
FLASH_DEVICE void store_rows(uint32_t shared, char* global, int64_t row_bytes, bool aligned,
                             int rows, int head_dim, int thread) {
  store_rows<Smem, kThreads>(shared, aligned, rows, head_dim, thread,
                             [=](int row) { return global + row * row_bytes; });
}

}  // namespace flash
