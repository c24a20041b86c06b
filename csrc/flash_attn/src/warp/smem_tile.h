// How a tile lies in shared memory.
//
// A tile is cut into groups of columns of 128 bytes (64 if its rows are no multiple of 128), each
// with all of the tile's rows: a row of a group is 128 (64) bytes. Its 16-byte chunks are permuted:
// chunk c of row r lies at c ^ (r % 8) (c ^ (r / 2 % 4)). So the eight rows that ldmatrix reads at
// a time, the chunks that eight threads copy, and an accumulator's eight rows of 16 bytes each lie
// in eight different groups of four banks: no access conflicts.
#pragma once

#include "base/host_device.h"

namespace flash {

inline constexpr int kChunkBytes = 16;
inline constexpr int kElementBytes = 2;  // fp16, bf16
inline constexpr int kChunkElements = kChunkBytes / kElementBytes;

// Of a tile: the permutation of chunks is one of address bits below it.
inline constexpr int kSmemAlignment = 128;

// Of a group.
FLASH_INLINE constexpr int group_columns(int head_dim, int element_bytes = kElementBytes) {
  const int columns = 128 / element_bytes;
  return head_dim % columns == 0 ? columns : columns / 2;
}

template <int kHeadDim, int kRows, int kBytesOfElement = kElementBytes,
          int kColumns = group_columns(kHeadDim, kBytesOfElement)>
struct SmemTile {
  static constexpr int kGroupCols = kColumns;
  static constexpr int kGroups = kHeadDim / kGroupCols;
  static constexpr int kRowBytes = kGroupCols * kBytesOfElement;  // of a group
  static constexpr int kChunks = kRowBytes / kChunkBytes;         // of a group's row
  static constexpr int kGroupBytes = kRows * kRowBytes;
  static constexpr int kBytes = kGroups * kGroupBytes;

  // Byte offset of a chunk; `chunk` counts over the whole row of the matrix.
  FLASH_INLINE static constexpr int offset(int row, int chunk) {
    const int permutation = kChunks == 8 ? row & 7 : row >> 1 & 3;
    return chunk / kChunks * kGroupBytes + row * kRowBytes +
           ((chunk % kChunks) ^ permutation) * kChunkBytes;
  }

  // From an even chunk of the first group to the one 2 k further on: first ^ flip(k), + ahead(k).
  FLASH_INLINE static constexpr int flip(int k) { return k % (kChunks / 2) * 2 * kChunkBytes; }
  FLASH_INLINE static constexpr int ahead(int k) { return k / (kChunks / 2) * kGroupBytes; }
};

}  // namespace flash
