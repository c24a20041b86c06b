// A warp's copies of keys and values from global to shared memory, by cp.async.
#pragma once

#include "base/ptx/cp_async.h"
#include "base/static_for.h"
#include "warp/load.h"
#include "warp/page_table.h"
#include "warp/smem_tile.h"

namespace flash {

// The rows of one key-value head's keys, or values, of one sequence.
struct KeyRows {
  const char* first;  // dense: of key 0; with pages the first row of page 0
  int64_t row_bytes, page_bytes;
  int head_dim;
  bool aligned;  // rows are chunks of 16 bytes that start at multiples of 16
};

// A warp's copies of K or V, kRows rows at a time. A lane always copies the same chunk of a group,
// of every fourth row.
template <class Smem, int kRows>
class WarpLoader {
 public:
  FLASH_DEVICE WarpLoader(const KeyRows& x, unsigned lane)
      : row_(static_cast<int>(lane / Smem::kChunks)),
        columns_(x.head_dim - static_cast<int>(lane % Smem::kChunks) * kChunkElements),
        offset_(Smem::offset(row_, static_cast<int>(lane % Smem::kChunks))),
        first_(x.first + row_ * x.row_bytes + lane % Smem::kChunks * kChunkBytes),
        row_bytes_(x.row_bytes),
        page_bytes_(x.page_bytes),
        aligned_(x.aligned),
        is_whole_(x.aligned && x.head_dim == Smem::kGroups * Smem::kGroupCols) {}

  // Rows key.. to the tile at `shared`; those from `rows` on, and columns beyond the head dim,
  // become 0.
  FLASH_DEVICE void copy(uint32_t shared, int key, int rows, const PageTable& pages) const {
    if (pages.table == nullptr) return copy_run(shared, first_ + key * row_bytes_, rows);
    const int first = pages.first_row + key, last = first + min(rows, kRows) - 1;
    const int index = pages.size.quotient(first);
    if (index != pages.size.quotient(last)) return copy_scattered(shared, first, rows, pages);
    pages.at(first, index,
             [&](int page, int row) { copy_run(shared, place(page, row), page < 0 ? 0 : rows); });
  }

 private:
  static_assert(Smem::kChunks == 8);
  static constexpr int kRowStep = 32 / Smem::kChunks;

  FLASH_DEVICE const char* place(int page, int row) const {
    return first_ + page * page_bytes_ + row * row_bytes_;
  }

  // Rows that lie one after the other. `source` is this lane's chunk of its first row.
  FLASH_DEVICE void copy_run(uint32_t shared, const char* source, int rows) const {
    const int64_t step = kRowStep * row_bytes_;
    if (!is_whole_ || rows < kRows) return copy_part(shared, source, rows, step);
    static_for<kRows / kRowStep>([&](auto i) {
      copy_row<i>(shared, source, true, Smem::kGroups * Smem::kGroupCols);
      source += step;
    });
  }

  FLASH_DEVICE void copy_part(uint32_t shared, const char* source, int rows, int64_t step) const {
#pragma unroll 1
    for (int i = 0; i < kRows; i += kRowStep, source += step)
      copy_any(shared, i, source, row_ + i < rows);
  }

  // Rows of several pages.
  FLASH_DEVICE void copy_scattered(uint32_t shared, int first, int rows,
                                   const PageTable& pages) const {
#pragma unroll 1
    for (int i = 0; i < kRows; i += kRowStep) {
      const int row = min(row_ + i, rows - 1) + first;
      pages.at(row, [&](int page, int row_of_page) {
        // This lane's first_ is of row row_.
        copy_any(shared, i, place(page, row_of_page) - row_ * row_bytes_,
                 row_ + i < rows && page >= 0);
      });
    }
  }

  // Row row_ + i of the tile, an i that the compiler does not know.
  FLASH_DEVICE void copy_any(uint32_t shared, int i, const char* source, bool exists) const {
    const uint32_t to = shared + i * Smem::kRowBytes;
    if (aligned_) {
      if (i / kRowStep % 2 == 0) return copy_row<0>(to, source, exists, columns_);
      return copy_row<1>(to - kRowStep * Smem::kRowBytes, source, exists, columns_);
    }
    const uint32_t mine = to + (offset_ ^ (i / kRowStep % 2 * kRowStep * kChunkBytes));
#pragma unroll 1
    for (int g = 0; g < Smem::kGroups; ++g)
      copy_elements(mine + g * Smem::kGroupBytes, source + g * Smem::kRowBytes,
                    exists ? (columns_ - g * Smem::kGroupCols) * kElementBytes : 0);
  }

  // This lane's row kI. Columns from `columns` on, counted from its chunk, become 0.
  template <int kI>
  FLASH_DEVICE void copy_row(uint32_t shared, const char* source, bool exists, int columns) const {
    // The permutation of chunks depends on row % 8, here on whether kI is odd.
    const uint32_t to = shared + (offset_ ^ (kI % 2 * kRowStep * kChunkBytes));
    static_for<Smem::kGroups>([&](auto g) {
      ptx::cp_async_16_bytes<kI * kRowStep * Smem::kRowBytes + g * Smem::kGroupBytes,
                             g * Smem::kRowBytes>(to, source,
                                                  exists && g * Smem::kGroupCols < columns);
    });
  }

  int row_;            // this lane's first
  int columns_;        // of the head, from this lane's chunk on
  uint32_t offset_;    // of this lane's chunk of its first row in a tile
  const char* first_;  // it, of key 0
  int64_t row_bytes_, page_bytes_;
  bool aligned_, is_whole_;
};

}  // namespace flash
