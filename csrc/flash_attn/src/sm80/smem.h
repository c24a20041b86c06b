// What lies where in a CTA's shared memory, and how a 16-bit tile lies there.
//
// A row of a tile is a row of its matrix. Its 16-byte chunks are permuted: chunk c of row r lies at
// c ^ (r % 8). So the eight rows that ldmatrix reads at a time, the eight chunks of a row that
// eight threads copy, and an accumulator's eight rows of 16 bytes each lie in eight different
// groups of four banks: no access conflicts.
#pragma once

#include <cstdint>

#include "base/host_device.h"
#include "sm80/tile_table.h"

namespace flash::sm80 {

inline constexpr int kChunkBytes = 16;
inline constexpr int kElementBytes = 2;  // fp16, bf16
inline constexpr int kChunkElements = kChunkBytes / kElementBytes;

template <int kHeadDim>
struct SmemTile {
  static constexpr int kChunks = kHeadDim / kChunkElements;
  static constexpr int kRowBytes = kHeadDim * kElementBytes;

  // Byte offset of a chunk. The three lowest bits of the chunk are XORed alone, so the chunk 2 k
  // further on (within the row, counted from an even chunk 0) lies at offset ^ (k * 32).
  FLASH_INLINE static constexpr int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (row & 7)) * kChunkBytes;
  }
};

template <FwdConfig C>
struct SmemPlan {
  static constexpr Tile kTile = C.tile();
  static constexpr int kRowBytes = SmemTile<C.head_dim>::kRowBytes;

  // Q until the last block of keys; then O on its way to memory, each warp in its own rows.
  alignas(1024) char q[kTile.m * kRowBytes];
  alignas(1024) char ring[kTile.stages][kTile.n * kRowBytes];
};

}  // namespace flash::sm80
