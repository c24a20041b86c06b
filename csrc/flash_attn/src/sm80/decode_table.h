// How the decode kernel cuts its work, for each bucket of head dims.
#pragma once

#include <algorithm>
#include <iterator>

#include "common/split_heuristic.h"
#include "sm80/tile_table.h"

namespace flash::sm80 {

inline constexpr int kDecodeRows = 16;  // of a CTA: those of an mma

struct DecodeTile {
  int head_dim, head_dim_v;  // smaller ones are filled up with zeros
  int n;                     // keys of a warp's block
  int warps;                 // each takes every warps-th block of n keys
  int stages;                // slots of a warp's ring
  bool q_in_registers;       // else each step reads it from shared memory
  int ctas_per_sm;           // what registers are held to
};

// A warp's slot has 4 KiB at d <= 128: three of four are under way, 48 KiB for a CTA, and two CTAs
// fit on an SM of compute capability 8.0. At d = 256 the output takes 128 registers and Q has to
// stay in shared memory; more than two slots of 8 KiB a warp would not fit into the 99 KiB that
// some devices have.
inline constexpr DecodeTile kDecodeTiles[] = {
    {.head_dim = 64,
     .head_dim_v = 64,
     .n = 32,
     .warps = 4,
     .stages = 4,
     .q_in_registers = true,
     .ctas_per_sm = 2},
    {.head_dim = 128,
     .head_dim_v = 128,
     .n = 16,
     .warps = 4,
     .stages = 4,
     .q_in_registers = true,
     .ctas_per_sm = 2},
    {.head_dim = 256,
     .head_dim_v = 256,
     .n = 16,
     .warps = 4,
     .stages = 2,
     .q_in_registers = false,
     .ctas_per_sm = 2},
};

constexpr const DecodeTile& decode_tile_of(int64_t head_dim, int64_t head_dim_v) {
  return *std::find_if(std::begin(kDecodeTiles), std::end(kDecodeTiles), [=](const DecodeTile& t) {
    return t.head_dim >= head_dim && t.head_dim_v >= head_dim_v;
  });
}

constexpr bool is_valid(const DecodeTile& t) {
  return t.n % 16 == 0 && kMinUnitKeys % (t.warps * t.n) == 0 && t.head_dim % 64 == 0 &&
         // The warps sum up the output in as many parts.
         t.head_dim_v % (t.warps * 16) == 0 && t.stages >= 2;
}
static_assert(std::all_of(std::begin(kDecodeTiles), std::end(kDecodeTiles),
                          [](const DecodeTile& t) { return is_valid(t); }));

// One kernel.
struct DecodeConfig {
  Dtype dtype;
  int head_dim, head_dim_v;

  static constexpr ScoreClass scores = ScoreClass::kModified;  // any, chosen when it runs

  constexpr bool operator==(const DecodeConfig&) const = default;

  consteval DecodeTile tile() const {
    for (const DecodeTile& tile : kDecodeTiles)
      if (tile.head_dim == head_dim && tile.head_dim_v == head_dim_v) return tile;
    return {};
  }
  consteval int threads() const { return 32 * tile().warps; }
  consteval int ctas_per_sm() const { return tile().ctas_per_sm; }
  consteval int block_keys() const { return tile().warps * tile().n; }  // of all warps
  consteval int warp_keys() const { return tile().n; }
  consteval int row_tiles() const { return kDecodeRows / 16; }  // m16 tiles of a warp
};

}  // namespace flash::sm80
