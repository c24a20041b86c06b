// Global to shared memory.
#pragma once

#include <cstdint>

#include "base/ptx/cp_async.h"
#include "base/ptx/shared_memory.h"
#include "base/ptx/special_registers.h"
#include "base/static_for.h"
#include "common/flash.h"
#include "warp/page_table.h"
#include "warp/smem_tile.h"

namespace flash {

// Copies 16 bytes of a row that starts anywhere, element by element; what lies beyond `bytes`
// becomes 0.
FLASH_DEVICE void copy_elements(uint32_t shared, const char* source, int bytes) {
  const auto element = [&](int i) -> uint32_t {
    if (i * kElementBytes >= bytes) return 0;
    return *reinterpret_cast<const uint16_t*>(source + i * kElementBytes);
  };
  ptx::store_shared(shared, uint4{element(0) | element(1) << 16, element(2) | element(3) << 16,
                                  element(4) | element(5) << 16, element(6) | element(7) << 16});
}

// A thread's share of the copies of one matrix's tiles (kRows x Smem's columns): always the same
// chunk of a group, of every kRowStep-th row. Neighbouring threads copy neighbouring chunks.
template <class Smem, int kRows, int kThreads>
class TileLoader {
 public:
  // The matrix has `rows` rows of `head_dim` elements. `matrix` is its first row, with pages the
  // first of page 0.
  FLASH_DEVICE TileLoader(const void* matrix, int rows, int head_dim)
      : source_(static_cast<const char*>(matrix) + chunk() * kChunkBytes),
        rows_(rows - row()),
        head_dim_(head_dim) {}

  // Copies rows first_row.. to the tile at `shared`. Rows and columns beyond the matrix become 0.
  // `aligned`: rows start at multiples of 16 bytes and have head dims that are multiples of 8;
  // others are copied element by element, by ordinary loads and stores.
  FLASH_DEVICE void copy(uint32_t shared, int first_row, int64_t row_bytes, bool aligned) const {
    const char* first = source_ + (first_row + row()) * row_bytes;
    copy_rows(shared, rows_ - first_row, aligned,
              [=](int i) { return Row{first + i * row_bytes, true}; });
  }

  // The same of rows in pages, which are page_bytes apart.
  FLASH_DEVICE void copy(uint32_t shared, int first_row, int64_t row_bytes, bool aligned,
                         const PageTable& pages, int64_t page_bytes) const {
    const int rows = rows_ - first_row;
    const int first = pages.first_row + first_row + row();
    copy_rows(shared, rows, aligned, [&](int i) {
      if (i >= rows) return Row{source_, false};
      return pages.at(first + i, [&](int page, int row_of_page) {
        return Row{source_ + page * page_bytes + row_of_page * row_bytes, page >= 0};
      });
    });
  }

 private:
  static constexpr int kRowStep = kThreads / Smem::kChunks;
  // The permutation of chunks depends on row % 8: it is the same in all rows of this thread.
  static_assert(kRowStep % 8 == 0 && kRows % kRowStep == 0);

  struct Row {
    const char* address;  // of this thread's chunk of the first group
    bool exists;
  };

  FLASH_DEVICE static int row() { return ptx::read_tid_x() / Smem::kChunks; }
  FLASH_DEVICE static int chunk() { return ptx::read_tid_x() % Smem::kChunks; }

  // row_at(i): the row i rows from this thread's first. The first `rows` are the matrix's.
  template <class RowAt>
  FLASH_DEVICE void copy_rows(uint32_t shared, int rows, bool aligned, const RowAt& row_at) const {
    const int thread = ptx::read_tid_x();
    const uint32_t destination =
        shared + Smem::offset(thread / Smem::kChunks, thread % Smem::kChunks);
    // From this thread's chunk of the first group on.
    const int columns = head_dim_ - thread % Smem::kChunks * kChunkElements;
    if (aligned) {
      static_for<kRows / kRowStep>([&](auto i) {
        const Row source = row_at(i * kRowStep);
        const bool exists = i * kRowStep < rows && source.exists;
        static_for<Smem::kGroups>([&](auto g) {
          ptx::cp_async_16_bytes<i * kRowStep * Smem::kRowBytes + g * Smem::kGroupBytes,
                                 g * Smem::kRowBytes>(destination, source.address,
                                                      exists && g * Smem::kGroupCols < columns);
        });
      });
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kRows; i += kRowStep) {
      const Row source = row_at(i);
      const bool exists = i < rows && source.exists;
#pragma unroll 1
      for (int g = 0; g < Smem::kGroups; ++g)
        copy_elements(destination + i * Smem::kRowBytes + g * Smem::kGroupBytes,
                      source.address + g * Smem::kRowBytes,
                      exists ? (columns - g * Smem::kGroupCols) * kElementBytes : 0);
    }
  }

  const char* source_;  // row 0, this thread's chunk of the first group
  int rows_;            // from this thread's first row on
  int head_dim_;
};

}  // namespace flash
