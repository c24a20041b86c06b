// Global to shared memory in the decode kernel: each warp fetches its own keys and values.
#pragma once

#include "common/block_range.h"
#include "sm80/decode_params.h"
#include "sm80/decode_smem.h"
#include "sm80/load.h"
#include "sm80/pipeline.h"

namespace flash::sm80 {

// The rows of one key-value head's keys, or values, of one sequence.
struct KeyRows {
  const char* first;  // dense: of key 0; with pages the first row of page 0
  int64_t row_bytes, page_bytes;
  int head_dim;
  bool aligned;  // rows are chunks of 16 bytes that start at multiples of 16
};

// Where a sequence's keys lie in its pages.
struct PageTable {
  const int32_t* table;  // the sequence's row of block_table; null: not paged
  int count;             // of pages that there are
  int first_row;         // of key 0
  FastDivide size;
};

// Copies kRows rows of K or V by one warp. A lane always copies the same chunk of a group, of every
// fourth row.
template <class Smem, int kRows>
class WarpLoader {
 public:
  // Rows key.. of a dense sequence to the tile at `shared`; those from `rows` on, and columns beyond
  // the head dim, become 0.
  FLASH_DEVICE static void copy(uint32_t shared, const KeyRows& x, int key, int rows) {
    copy_run(shared, x, x.first + key * x.row_bytes, rows);
  }

  // The same of a sequence in pages. Rows in one page are a run.
  FLASH_DEVICE static void copy(uint32_t shared, const KeyRows& x, int key, int rows,
                                const PageTable& pages) {
    const int first = pages.first_row + key, last = first + min(rows, kRows) - 1;
    const int index = pages.size.quotient(first);
    if (index == pages.size.quotient(last)) {
      const Row row = row_of(x, first, index, pages);
      return copy_run(shared, x, row.address, row.exists ? rows : 0);
    }
    copy_rows(shared, x, [&](int i) {
      if (row() + i >= rows) return Row{x.first, false};
      const int place = first + row() + i;
      return row_of(x, place, pages.size.quotient(place), pages);
    });
  }

 private:
  static_assert(Smem::kChunks == 8);
  static constexpr int kRowStep = 32 / Smem::kChunks;

  struct Row {
    const char* address;
    bool exists;
  };

  FLASH_DEVICE static int lane() { return ptx::read_tid_x() % 32; }
  FLASH_DEVICE static int row() { return lane() / Smem::kChunks; }
  FLASH_DEVICE static int chunk() { return lane() % Smem::kChunks; }

  // Row `place` of the sequence's pages, in entry `index` of the table.
  FLASH_DEVICE static Row row_of(const KeyRows& x, int place, int index, const PageTable& pages) {
    const int page = pages.table[index];
    const int row_of_page = place - index * pages.size.divisor;
    return {x.first + page * x.page_bytes + row_of_page * x.row_bytes,
            static_cast<unsigned>(page) < static_cast<unsigned>(pages.count)};
  }

  FLASH_DEVICE static void copy_run(uint32_t shared, const KeyRows& x, const char* first,
                                    int rows) {
    const char* mine = first + row() * x.row_bytes;
    if (rows >= kRows && x.aligned && x.head_dim == Smem::kGroups * Smem::kGroupCols) {
      mine += chunk() * kChunkBytes;
      for_each_row([&](auto i) {
        copy_row<i>(shared, mine, Smem::kGroups * Smem::kGroupCols);
        mine += kRowStep * x.row_bytes;
      });
      return;
    }
    copy_rows(shared, x, [&](int i) { return Row{mine + i * x.row_bytes, row() + i < rows}; });
  }

  // row_at(i): the row i rows from this lane's first.
  template <class RowAt>
  FLASH_DEVICE static void copy_rows(uint32_t shared, const KeyRows& x, const RowAt& row_at) {
    const int columns = x.head_dim - chunk() * kChunkElements;
    if (x.aligned) {
      for_each_row([&](auto i) {
        const Row source = row_at(i * kRowStep);
        copy_row<i>(shared, source.address + chunk() * kChunkBytes, source.exists ? columns : 0);
      });
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kRows; i += kRowStep) {
      const Row source = row_at(i);
#pragma unroll 1
      for (int g = 0; g < Smem::kGroups; ++g)
        copy_elements(shared + Smem::offset(row() + i, chunk()) + g * Smem::kGroupBytes,
                      source.address + chunk() * kChunkBytes + g * Smem::kRowBytes,
                      source.exists ? (columns - g * Smem::kGroupCols) * kElementBytes : 0);
    }
  }

  // Columns from `columns` on, counted from this lane's first, become 0.
  template <int kI>
  FLASH_DEVICE static void copy_row(uint32_t shared, const char* source, int columns) {
    // The permutation of chunks depends on row % 8, here on whether i is odd.
    const uint32_t destination =
        (shared + Smem::offset(row(), chunk())) ^ (kI % 2 * kRowStep * kChunkBytes);
    static_for<Smem::kGroups>([&](auto g) {
      ptx::cp_async_16_bytes<kI * kRowStep * Smem::kRowBytes + g * Smem::kGroupBytes,
                             g * Smem::kRowBytes>(destination, source,
                                                  g * Smem::kGroupCols < columns);
    });
  }

  template <class Body>
  FLASH_DEVICE static void for_each_row(const Body& body) {
    static_for<kRows / kRowStep>(body);
  }
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
    int first_key;      // of this warp's keys of block 0
    int seen_begin, seen_end;  // keys that a row sees
  };

  FLASH_DEVICE WarpBlocks(const Source& source, uint32_t ring, int first_block, int end_block)
      : source_(source), ring_(ring), end_block_(end_block) {
    static_for<kStages - 1>([&](auto step) {
      if constexpr (step % 2 == 0) {
        fetch_k(first_block + step / 2, step);
      } else {
        fetch_v(first_block + step / 2, step);
      }
    });
  }

  FLASH_DEVICE int key(int block) const { return source_.first_key + block * C.block_keys(); }
  // Whether some row sees some of this warp's keys of a block.
  FLASH_DEVICE bool is_seen(int block) const {
    return key(block) < source_.seen_end && key(block) + kTile.n > source_.seen_begin;
  }

  // Begins a step over K, or V, of `block`: its slot is full, the one of the step before is free.
  // Returns the slot's address.
  FLASH_DEVICE uint32_t next_k(int block) {
    wait();
    if constexpr (kStages % 2 == 0) {
      fetch_v(block + kStages / 2 - 1, pipe_.freed());
    } else {
      fetch_k(block + kStages / 2, pipe_.freed());
    }
    return take();
  }
  FLASH_DEVICE uint32_t next_v(int block) {
    wait();
    if constexpr (kStages % 2 == 0) {
      fetch_k(block + kStages / 2, pipe_.freed());
    } else {
      fetch_v(block + kStages / 2, pipe_.freed());
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
  FLASH_DEVICE void fetch_k(int block, int slot) const {
    copy<typename Plan::K>(source_.k, block, slot);
  }
  FLASH_DEVICE void fetch_v(int block, int slot) const {
    copy<typename Plan::V>(source_.v, block, slot);
  }
  template <class Smem>
  FLASH_DEVICE void copy(const KeyRows& x, int block, int slot) const {
    using Loader = WarpLoader<Smem, kTile.n>;
    if (block < end_block_ && is_seen(block)) {
      const uint32_t shared = ring_ + slot * Plan::kSlotBytes;
      const int rows = source_.seqlen_k - key(block);
      if (source_.pages.table == nullptr) {
        Loader::copy(shared, x, key(block), rows);
      } else {
        Loader::copy(shared, x, key(block), rows, source_.pages);
      }
    }
    ptx::cp_async_commit_group();
  }

  Source source_;
  uint32_t ring_;
  int end_block_;
  PipeState<kStages> pipe_;
};

}  // namespace flash::sm80
