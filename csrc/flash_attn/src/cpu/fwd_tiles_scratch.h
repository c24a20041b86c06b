// Scratch memory of the forward on bf16 tiles, and the sizes of its blocks.
#pragma once

#include "cpu/decode.h"
#include "cpu/tile_units.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr int kRandomKeys = 2 * kUnitKeys;    // whose random bytes are made at once
inline constexpr int kRandomRow = kRandomKeys + 32;  // random_row_bytes may write more

struct FwdTilesScratch {
  float* o;  // [task_rows][dv], padded to kTileN
  uint32_t *packed_q, *packed_k, *packed_v;
  uint32_t* packed_p;  // [32] x [2 pieces]
  float* units;        // two of [32][kUnitKeys] scores
  float* again;        // [32][kUnitKeys] of each unit of a piece
  float* sums;         // two of [task_rows][kWidth]; BlockState::sums says which counts
  float* reference;    // [task_rows]: what to add to a scaled score; kNoReference before the first
  float* largest;      // [task_rows]: the score that is the reference, not scaled; -inf before
  float* shift;        // [task_rows]: what to subtract from scores: 0, or `largest` where it is far
  float* buffer;       // a row of Q
  RowState* state;     // [task_rows]
  Row* rows;           // [task_rows]
  int task_rows;
  struct BlockState {
    bool unset;     // a row has no reference
    bool far;       // a row has a shift
    int sums;       // which
  }* blocks;        // [task_rows / 32]
  uint8_t* random;  // [32][kRandomRow]
  uint8_t* spoilt;  // [tile.keys]: V's rows with inf or NaN
  Staging staging;

  BlockState& block(int row) const { return blocks[row / kBlockRows]; }
  float* sums_of(int row, int which) const {
    return sums + (int64_t{which} * task_rows + row) * kWidth;
  }
};

inline FwdTile fwd_tile(const Flash_fwd_params& p, int terms, int piece_keys) {
  const HeadDims dims(p);
  const int d = dims.d_pad, dv = dims.d_v_pad;
  int keys = (512 << 10) / (2 * terms * (d + dv)) / piece_keys * piece_keys;
  keys = keys < piece_keys ? piece_keys : keys > 1024 ? 1024 : keys;
  int task_rows = (768 << 10) / (2 * terms * d + 4 * dv) / kBlockRows * kBlockRows;
  task_rows = task_rows < kBlockRows ? kBlockRows : task_rows > 2048 ? 2048 : task_rows;
  return {.rows = kBlockRows, .keys = keys, .task_rows = task_rows, .stream = stream_tile(p)};
}

inline FwdTilesScratch carve_fwd_tiles(Carver& c, const Flash_fwd_params& p, const FwdTile& tile,
                                       int terms, int piece_keys) {
  const HeadDims dims(p);
  const int64_t d = dims.d_pad, dv = dims.d_v_pad;
  FwdTilesScratch x{};
  x.task_rows = tile.task_rows;
  x.o = c.take<float>(tile.task_rows * dv);
  x.packed_q = c.take<uint32_t>(packed_words(tile.task_rows, d, terms));
  x.packed_k = c.take<uint32_t>(packed_words(tile.keys, d, terms));
  x.packed_v = c.take<uint32_t>(packed_words(tile.keys, dv, terms));
  x.packed_p = c.take<uint32_t>(packed_words(kBlockRows, 2 * piece_keys, terms));
  x.units = c.take<float>(2 * kUnitScores);
  x.again = c.take<float>(piece_keys / kUnitKeys * kUnitScores);
  x.sums = c.take<float>(2 * int64_t{tile.task_rows} * kWidth);
  x.reference = c.take<float>(tile.task_rows);
  x.largest = c.take<float>(tile.task_rows);
  x.shift = c.take<float>(tile.task_rows);
  x.staging = carve_staging(c, terms, dims.largest_pad());
  x.buffer = c.take<float>(d);
  x.state = c.take<RowState>(tile.task_rows);
  x.rows = c.take<Row>(tile.task_rows);
  x.blocks = c.take<FwdTilesScratch::BlockState>(tile.task_rows / kBlockRows);
  x.random = c.take<uint8_t>(kBlockRows * kRandomRow);
  x.spoilt = c.take<uint8_t>(tile.keys);
  return x;
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
