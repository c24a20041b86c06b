// Scratch memory of the backward on bf16 tiles, and the sizes of its blocks.
#pragma once

#include "base/cpu/parallel.h"
#include "cpu/bwd_weights.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr int kLargestChunk = 1024;
inline constexpr int kSumGroup = 4 * kTileWords;  // 2 x 2 tiles of a sum

struct BwdTilesScratch {
  uint32_t *q, *dout;      // [tile.rows] x [d], [dv]: A of S and dP
  uint32_t *q_t, *dout_t;  // their transposes: A of dK^T and dV^T
  uint32_t *k_t, *v_t;     // the chunk: B of S and dP
  uint32_t* k;             // B of dQ, block by block
  uint32_t* pairs;         // P, then dS, [tile.rows] x [kUnitKeys]: B of dV^T and dK^T
  uint32_t* ds;            // [tile.rows] x [kBwdBlockKeys]: A of dQ
  float *dk, *dv;          // [keys / 32][d / 16], [dv / 16][2] tiles
  float* units;            // two of S and dP, [32][kUnitKeys] each
  float* lse;              // [tile.rows]: what to add to exponents; behind it what to take from dP
  Row* rows;               // [tile.rows]
  uint8_t* begun;          // [keys / 32]: columns whose dk and dv hold sums
  float* cap_slope;        // [kUnitKeys]
  uint8_t* random;         // [tile.rows][kBwdRandomKeys], with dropout
  uint8_t *spoilt_q, *spoilt_dout, *spoilt_k;
  uint32_t* finite;  // copies of `pairs` or `ds`
  float* row;
  Staging staging;
};

// For all threads.
inline bool large_chunks_suffice(const Flash_bwd_params& p) {
  const int64_t chunks = (p.seqlen_k + kLargestChunk - 1) / kLargestChunk;
  return p.b * p.h_k * chunks >= 4 * num_threads();
}

inline BwdTile bwd_tile(const Flash_bwd_params& p, int terms) {
  const HeadDims dims(p);
  const int d = dims.d_pad, dv = dims.d_v_pad, rows = bwd_block_rows(terms);
  const int keys = (1 << 20) / (2 * terms * (2 * d + dv) + 4 * (d + dv)) / 64 * 64;
  // Rows are packed for each chunk. Sums do not depend on the size of chunks of whole blocks.
  if (keys >= kLargestChunk && large_chunks_suffice(p)) return {rows, kLargestChunk};
  return {rows, keys < 64 ? 64 : keys > 512 ? 512 : keys};
}

inline BwdTilesScratch carve_bwd_tiles(Carver& c, const Flash_bwd_params& p, const BwdTile& tile,
                                       int terms) {
  const HeadDims dims(p);
  const int64_t d = dims.d_pad, dv = dims.d_v_pad;
  const auto grid = [&](int64_t rows, int64_t depth) {
    return c.take<uint32_t>(packed_words(rows, depth, terms));
  };
  BwdTilesScratch x{};
  x.q = grid(tile.rows, d);
  x.dout = grid(tile.rows, dv);
  x.q_t = grid(tile.rows, d);
  x.dout_t = grid(tile.rows, dv);
  x.k_t = grid(tile.keys, d);
  x.v_t = grid(tile.keys, dv);
  x.k = grid(round_up(tile.keys, kBwdBlockKeys), d);
  x.pairs = grid(tile.rows, 2 * kUnitKeys);
  x.ds = grid(tile.rows, kBwdBlockKeys);
  x.dk = c.take<float>(tile.keys * d);
  x.dv = c.take<float>(tile.keys * dv);
  x.units = c.take<float>(4 * kUnitScores);
  x.lse = c.take<float>(2 * tile.rows);
  x.staging = carve_staging(c, terms, dims.largest_pad());
  x.cap_slope = c.take<float>(kUnitKeys);
  x.rows = c.take<Row>(tile.rows);
  x.begun = c.take<uint8_t>(tile.keys / kUnitKeys);
  x.random = c.take<uint8_t>(p.p_dropout > 0.f ? tile.rows * kBwdRandomKeys : 0);
  x.spoilt_q = c.take<uint8_t>(tile.rows);
  x.spoilt_dout = c.take<uint8_t>(tile.rows);
  x.spoilt_k = c.take<uint8_t>(tile.keys);
  x.finite = grid(tile.rows, kBwdBlockKeys);
  x.row = c.take<float>(dims.largest_pad());
  return x;
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
