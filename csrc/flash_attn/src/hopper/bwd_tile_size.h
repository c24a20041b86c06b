// How a kernel of the backward cuts its work, for each bucket of head dims.
#pragma once

#include <algorithm>
#include <iterator>

#include "base/host_device.h"
#include "hopper/tile_size.h"
#include "warp/smem_tile.h"

namespace flash::hopper {

inline constexpr int kBwdWarpgroups = 2;  // that multiply

struct BwdTile {
  int head_dim;               // of q, k and v; smaller ones are filled up with zeros, by TMA
  int m, n;                   // queries of a block, keys of a CTA
  int q_stages, dout_stages;  // slots of the rings of Q and of dO
  int registers;              // of a thread of a warpgroup that multiplies

  // Each warpgroup has 64 keys of its own; or both have the same 64, and columns of dK and dV.
  FLASH_INLINE constexpr bool keys_apart() const { return n == kBwdWarpgroups * kWarpgroupRows; }
};

// In the order of their costs: a call takes the first that has its head dims. docs/hopper.md has
// the arithmetic of registers and shared memory.
inline constexpr BwdTile kBwdTiles[] = {
    {.head_dim = 64, .m = 128, .n = 128, .q_stages = 2, .dout_stages = 2, .registers = 232},
    {.head_dim = 96, .m = 64, .n = 128, .q_stages = 2, .dout_stages = 2, .registers = 232},
    {.head_dim = 128, .m = 64, .n = 128, .q_stages = 2, .dout_stages = 2, .registers = 240},
    {.head_dim = 192, .m = 64, .n = 64, .q_stages = 2, .dout_stages = 2, .registers = 240},
    {.head_dim = 256, .m = 64, .n = 64, .q_stages = 2, .dout_stages = 1, .registers = 240},
};

inline constexpr int kMaxBwdHeadDim = 256;

constexpr bool is_valid(const BwdTile& t) {
  // Of dQ a warpgroup has 64 queries, or some of the groups of columns.
  const bool shares_queries = t.m == kBwdWarpgroups * kWarpgroupRows;
  return (t.keys_apart() || t.n == kWarpgroupRows) && t.head_dim % 32 == 0 &&
         (shares_queries ? t.keys_apart() : t.m == kWarpgroupRows) &&
         (shares_queries || group_columns(t.head_dim) < t.head_dim);
}
static_assert(std::all_of(std::begin(kBwdTiles), std::end(kBwdTiles),
                          [](const BwdTile& tile) { return is_valid(tile); }));

// One kernel.
struct BwdConfig {
  Dtype dtype;
  int head_dim, head_dim_v;  // equal
  ScoreClass scores;

  constexpr bool operator==(const BwdConfig&) const = default;

  consteval BwdTile tile() const {
    return *std::find_if(std::begin(kBwdTiles), std::end(kBwdTiles),
                         [this](const BwdTile& tile) { return tile.head_dim == head_dim; });
  }
  consteval int m() const { return tile().m; }
  consteval int n() const { return tile().n; }
  consteval int consumer_warps() const { return 4 * kBwdWarpgroups; }
  consteval int threads() const { return kWarpgroupThreads * (1 + kBwdWarpgroups); }
  consteval int ctas_per_sm() const { return 1; }
  // setmaxnreg: of the 64 Ki registers of an SM.
  consteval int producer_registers() const { return 504 - 2 * tile().registers; }
  consteval int consumer_registers() const { return tile().registers; }
};

// Columns of dQ that a warpgroup stages at a time.
inline constexpr int kStagedColumns = 64;  // at most
FLASH_INLINE constexpr int staged_columns(int columns) {
  return columns < kStagedColumns ? columns : kStagedColumns;
}

// A warpgroup's part of a block's dQ, 64 queries x some columns.
struct DqPart {
  int row, column, columns;  // the first ones
  int first_sum;             // in a block's sums
};

// Whole queries where there are enough, or else groups of columns of K's tile: the first warpgroup
// has half of them, or one more.
template <BwdConfig C>
FLASH_INLINE constexpr DqPart dq_part(int warpgroup) {
  constexpr int kGroup = group_columns(C.head_dim), kGroups = C.head_dim / kGroup;
  if (C.m() > kWarpgroupRows)
    return {warpgroup * kWarpgroupRows, 0, C.head_dim, warpgroup * kWarpgroupRows * C.head_dim};
  constexpr int kFirst = (kGroups + 1) / 2 * kGroup;
  if (warpgroup == 0) return {0, 0, kFirst, 0};
  return {0, kFirst, C.head_dim - kFirst, kWarpgroupRows * kFirst};
}

}  // namespace flash::hopper
