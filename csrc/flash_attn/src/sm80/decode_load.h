// Global to shared memory in the decode kernel: each warp fetches its own keys and values.
#pragma once

#include "common/block_range.h"
#include "sm80/decode_params.h"
#include "sm80/decode_smem.h"
#include "sm80/load.h"
#include "sm80/page_table.h"
#include "sm80/pipeline.h"

namespace flash::sm80 {

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

// A warp's keys and values on their way through its ring. K and V take turns, from the first block
// to the last; a step reads one slot and fetches what is read kStages - 1 steps later.
template <DecodeConfig C>
class WarpBlocks {
 public:
  struct Source {
    KeyRows k, v;
    PageTable pages;
    int seqlen_k;
    int first_key;             // of this warp's keys of block 0
    int seen_begin, seen_end;  // keys that a row sees
  };

  FLASH_DEVICE WarpBlocks(const Source& source, uint32_t ring, unsigned lane, int first_block,
                          int end_block)
      : k_(source.k, lane),
        v_(source.v, lane),
        pages_(source.pages),
        seqlen_k_(source.seqlen_k),
        first_key_(source.first_key),
        seen_begin_(source.seen_begin),
        seen_end_(source.seen_end),
        ring_(ring),
        end_block_(end_block) {
    // Not unrolled: the code of the copies is long.
#pragma unroll 1
    for (int step = 0; step < kStages - 1; ++step) {
      const int block = first_block + step / 2;
      if (step % 2 == 0) {
        fetch(k_, block, step);
      } else {
        fetch(v_, block, step);
      }
    }
  }

  FLASH_DEVICE int key(int block) const { return first_key_ + block * C.block_keys(); }
  // Whether some row sees some of this warp's keys of a block.
  FLASH_DEVICE bool is_seen(int block) const {
    return key(block) < seen_end_ && key(block) + kTile.n > seen_begin_;
  }

  // Begins a step over K, or V, of `block`: its slot is full, the one of the step before is free.
  // Returns the slot's address.
  FLASH_DEVICE uint32_t next_k(int block) {
    wait();
    if constexpr (kStages % 2 == 0) {
      fetch(v_, block + kStages / 2 - 1, pipe_.freed());
    } else {
      fetch(k_, block + kStages / 2, pipe_.freed());
    }
    return take();
  }
  FLASH_DEVICE uint32_t next_v(int block) {
    wait();
    if constexpr (kStages % 2 == 0) {
      fetch(k_, block + kStages / 2, pipe_.freed());
    } else {
      fetch(v_, block + kStages / 2, pipe_.freed());
    }
    return take();
  }

 private:
  static constexpr DecodeTile kTile = C.tile();
  static constexpr int kStages = kTile.stages;
  using Plan = SmemPlan<C>;

  // Lanes wait for their own copies, then for each other's.
  FLASH_DEVICE static void wait() {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncwarp();
  }

  FLASH_DEVICE uint32_t take() {
    const uint32_t slot = ring_ + pipe_.slot * Plan::kSlotBytes;
    pipe_.advance();
    return slot;
  }

  // Always a group of copies, maybe empty, so that the number of groups under way tells which have
  // landed.
  template <class Loader>
  FLASH_DEVICE void fetch(const Loader& loader, int block, int slot) const {
    if (block < end_block_ && is_seen(block))
      loader.copy(ring_ + slot * Plan::kSlotBytes, key(block), seqlen_k_ - key(block), pages_);
    ptx::cp_async_commit_group();
  }

  WarpLoader<typename Plan::K, kTile.n> k_;
  WarpLoader<typename Plan::V, kTile.n> v_;
  PageTable pages_;
  int seqlen_k_, first_key_, seen_begin_, seen_end_;
  uint32_t ring_;
  int end_block_;
  PipeState<kStages> pipe_;
};

}  // namespace flash::sm80
