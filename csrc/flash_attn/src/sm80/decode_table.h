// How the decode kernel cuts its work, for each bucket of head dims.
#pragma once

#include <algorithm>
#include <iterator>

#include "common/split_heuristic.h"
#include "sm80/tile_table.h"

namespace flash::sm80 {

inline constexpr int kDecodeRows = 16;  // of a CTA: those of an mma

struct DecodeTile {
  int head_dim, head_dim_v;       // smaller ones are filled up with zeros
  int n;                          // keys of a warp's block
  int warps;                      // each takes every warps-th block of n keys
  int stages;                     // slots of a warp's ring
  bool q_in_registers;            // else each step reads it from shared memory
  bool warps_share_keys = false;  // all work on the same block of n keys: decode_wide.h
  int ctas_per_sm;                // what registers are held to
};

// A warp's slot has 4 KiB at d <= 128: three of four are under way, 48 KiB for a CTA, and two CTAs
// fit on an SM of compute capability 8.0. At d = 256 the output takes 128 registers and Q has to
// stay in shared memory; more than two slots of 8 KiB a warp would not fit into the 99 KiB that
// some devices have. Beyond, a block's slot has 18 KiB, and a warp keeps a quarter of Q and of the
// output.
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
    {.head_dim = 576,
     .head_dim_v = 512,
     .n = 16,
     .warps = 4,
     .stages = 3,
     .q_in_registers = true,
     .warps_share_keys = true,
     .ctas_per_sm = 2},
};
inline constexpr int kMaxHeadDim = 576, kMaxHeadDimV = 512;

constexpr const DecodeTile& decode_tile_of(int64_t head_dim, int64_t head_dim_v) {
  return *std::find_if(std::begin(kDecodeTiles), std::end(kDecodeTiles), [=](const DecodeTile& t) {
    return t.head_dim >= head_dim && t.head_dim_v >= head_dim_v;
  });
}

// Of all warps.
constexpr int block_keys(const DecodeTile& t) { return t.warps_share_keys ? t.n : t.warps * t.n; }

constexpr bool is_valid(const DecodeTile& t) {
  if (t.n % 16 != 0 || kMinUnitKeys % block_keys(t) != 0 || t.head_dim % 64 != 0) return false;
  if (t.warps_share_keys) {
    // A warp has a quarter of each group of columns of Q and K, and whole groups of V's; rows are
    // copied by all threads; K and V take turns in the ring.
    return t.warps == 4 && t.n == 16 && t.head_dim_v % (t.warps * 64) == 0 && t.stages % 2 == 1;
  }
  // The warps sum up the output in as many parts.
  return t.head_dim_v % (t.warps * 16) == 0 && t.stages >= 2;
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
  consteval int rows() const { return kDecodeRows; }  // of a CTA
  consteval int threads() const { return 32 * tile().warps; }
  consteval int q_threads() const { return threads(); }  // that load Q
  consteval UnitSizes units() const { return {}; }
  consteval int ctas_per_sm() const { return tile().ctas_per_sm; }
  consteval int block_keys() const { return flash::sm80::block_keys(tile()); }
  consteval int warp_keys() const { return tile().n; }
  consteval int row_tiles() const { return kDecodeRows / 16; }  // m16 tiles of a warp
  consteval int warp_columns() const {                          // of the output
    return tile().warps_share_keys ? head_dim_v / tile().warps : head_dim_v;
  }
};

}  // namespace flash::sm80
