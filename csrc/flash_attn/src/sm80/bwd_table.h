// How a backward kernel cuts its work, for each bucket of head dims.
#pragma once

#include <algorithm>
#include <iterator>

#include "sm80/tile_table.h"

namespace flash::sm80 {

// Warps form three grids, one for each kind of product: over (queries, keys) for S and dP, over
// (keys, columns) for dK and dV, over (queries, columns) for dQ.
struct BwdTile {
  int head_dim;  // of q, k and v; smaller ones are filled up with zeros
  ScoreClass scores;
  int m, n;  // queries of a block, keys of a CTA
  int warps;
  int stages;                                    // blocks of Q and dO in shared memory
  int s_key_warps, kv_key_warps, q_query_warps;  // the other extents follow
  int ctas_per_sm;                               // what registers are held to
};

// In the order of their costs: a call takes the first that has what it needs, and whose shared
// memory the device has.
//
// A lane of 8 warps holds n d / 128 accumulators of dK and dV (128 at d = 128 and n = 128, d = 256
// and n = 64), m n / 128 of S and dP (64), and later m d / 256 of dQ in their place: 192 of 255
// registers. More keys a CTA mean fewer passes over Q, dO and dQ's sums; more queries a block,
// fewer barriers. At d = 128 K, V and two blocks of Q and dO, P and dS take 160 KiB; smaller tiles
// of half as many keys serve devices with 99 KiB, and all that modify scores.
inline constexpr BwdTile kBwdTiles[] = {
    {32, ScoreClass::kMasked, 64, 128, 8, 2, 4, 4, 4, 1},
    {64, ScoreClass::kMasked, 64, 128, 8, 2, 4, 4, 2, 1},
    {96, ScoreClass::kMasked, 64, 64, 4, 1, 2, 2, 2, 2},
    {128, ScoreClass::kMasked, 64, 128, 8, 2, 4, 4, 2, 1},
    {128, ScoreClass::kMasked, 64, 64, 8, 1, 2, 2, 2, 1},
    {192, ScoreClass::kMasked, 32, 64, 8, 1, 4, 2, 2, 1},
    {256, ScoreClass::kMasked, 64, 64, 8, 1, 2, 2, 2, 1},
    {256, ScoreClass::kMasked, 32, 32, 4, 1, 2, 1, 1, 2},
    {64, ScoreClass::kModified, 64, 128, 8, 2, 4, 4, 2, 1},
    {128, ScoreClass::kModified, 64, 64, 8, 1, 2, 2, 2, 1},
    {256, ScoreClass::kModified, 32, 32, 4, 1, 2, 1, 1, 2},
};

inline constexpr int kMaxBwdHeadDim = 256;

constexpr bool is_valid(const BwdTile& t) {
  const auto is_cut = [&](int rows, int row_warps, int columns) {
    return t.warps % row_warps == 0 && rows % (row_warps * 16) == 0 &&
           columns % (t.warps / row_warps * 16) == 0;
  };
  return t.warps % t.s_key_warps == 0 && is_cut(t.m, t.warps / t.s_key_warps, t.n) &&
         is_cut(t.n, t.kv_key_warps, t.head_dim) && is_cut(t.m, t.q_query_warps, t.head_dim) &&
         t.head_dim % 32 == 0 && t.n % 32 == 0 && (t.stages == 1 || t.stages == 2);
}
static_assert(std::all_of(std::begin(kBwdTiles), std::end(kBwdTiles),
                          [](const BwdTile& tile) { return is_valid(tile); }));

// One kernel.
struct BwdConfig {
  Dtype dtype;
  int head_dim, head_dim_v;  // equal
  ScoreClass scores;
  int n;

  constexpr bool operator==(const BwdConfig&) const = default;

  consteval BwdTile tile() const {
    for (const BwdTile& tile : kBwdTiles)
      if (tile.head_dim == head_dim && tile.scores == scores && tile.n == n) return tile;
    return {};
  }
  consteval int threads() const { return 32 * tile().warps; }
  consteval int ctas_per_sm() const { return tile().ctas_per_sm; }
  // Of a warp's scores.
  consteval int warp_rows() const { return tile().m / (tile().warps / tile().s_key_warps); }
  consteval int row_tiles() const { return warp_rows() / 16; }
  consteval int warp_keys() const { return tile().n / tile().s_key_warps; }
  consteval int warp_columns() const { return head_dim_v; }
};

}  // namespace flash::sm80
