// Global to shared memory.
#pragma once

#include <cstdint>

#include "base/ptx/cp_async.h"
#include "base/static_for.h"
#include "common/flash.h"
#include "sm80/smem.h"

namespace flash::sm80 {

// A thread's share of the copies of one matrix's tiles, kRows x C.head_dim: always the same chunk
// of a row, of every kRowStep-th row. Neighbouring threads copy neighbouring chunks.
template <FwdConfig C, int kRows>
class TileLoader {
 public:
  // The matrix has `rows` rows of `head_dim` elements, a multiple of 8, `row_stride` elements
  // apart.
  FLASH_DEVICE TileLoader(const void* matrix, int64_t row_stride, int rows, int head_dim)
      : row_bytes_(row_stride * kElementBytes) {
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    offset_ = SmemTile<C.head_dim>::offset(row, chunk);
    rows_ = chunk * kChunkElements < head_dim ? rows - row : 0;
    source_ = static_cast<const char*>(matrix) + row * row_bytes_ + chunk * kChunkBytes;
  }

  // Copies rows first_row.. to the tile at `shared`. Rows and columns beyond the matrix become 0.
  FLASH_DEVICE void copy(uint32_t shared, int first_row) const {
    const char* source = source_ + first_row * row_bytes_;
    const int rows = rows_ - first_row;
    static_for<kRows / kRowStep>([&](auto i) {
      ptx::cp_async_16_bytes<i * kRowStep * SmemTile<C.head_dim>::kRowBytes>(
          shared + offset_, source, i * kRowStep < rows);
      source += kRowStep * row_bytes_;
    });
  }

 private:
  static constexpr int kChunks = SmemTile<C.head_dim>::kChunks;
  static constexpr int kRowStep = C.threads() / kChunks;
  // The permutation of chunks depends on row % 8: it is the same in all rows of this thread.
  static_assert(kRowStep % 8 == 0 && kRows % kRowStep == 0);

  int64_t row_bytes_;
  const char* source_;  // this thread's first chunk of the matrix
  int rows_;            // rows from there on; 0 where the chunk lies beyond the last column
  int offset_;          // of this thread's first chunk within a tile
};

}  // namespace flash::sm80
