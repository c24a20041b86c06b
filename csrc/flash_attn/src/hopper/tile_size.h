// How a kernel cuts its work, for each bucket of head dims.
#pragma once

#include <algorithm>
#include <iterator>
#include <span>

#include "common/flash.h"
#include "warp/score_class.h"

namespace flash::hopper {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kWarpgroupRows = 64;  // queries: M of a wgmma

// How the exponentials of a warpgroup hide behind the products of another, and of its own.
enum class Overlap {
  // Warpgroups take turns at their exponentials. P V of a block and Q K^T of the next are issued
  // one behind the other, so that the tensor core has two products of one warpgroup while another
  // is at its exponentials.
  kPingPong,
  // Warpgroups take turns at issuing. Q K^T of a block goes first, and P V of the one before runs
  // beside the block's softmax.
  kWithin,
  // Warpgroups take turns at their exponentials; products of one follow each other, with nothing
  // beside them.
  kApart,
};

struct Tile {
  int head_dim, head_dim_v;  // smaller ones are filled up with zeros, by TMA
  ScoreClass scores;
  int warpgroups;  // that multiply, of kWarpgroupRows queries each
  int n;           // keys of a block
  Overlap overlap = Overlap::kPingPong;
  int stages = 2;       // slots of the rings of K and of V
  int q_stages = 1;     // tiles of Q: with 2 the next one is fetched meanwhile
  bool o_apart = true;  // O has shared memory of its own; or it takes Q's
  int cluster = 1;      // CTAs that load K and V together, half of each block for both
  int polynomial = 0;   // every so many exponentials are computed by FMAs; 0: none
  int pv_columns = 0;   // of e4m3: of V in a product P V, which has accumulators of its own

  constexpr int m() const { return warpgroups * kWarpgroupRows; }
  constexpr int box_keys() const { return n / cluster; }  // that a CTA loads of a block
};

// In the order of their costs: a call takes the first that has what it needs. docs/hopper.md has
// the arithmetic of registers, shared memory and pipes.
// clang-format off
inline constexpr Tile kTiles[] = {
    {.head_dim = 64, .head_dim_v = 64, .scores = ScoreClass::kMasked,
     .warpgroups = 3, .n = 128, .overlap = Overlap::kWithin, .q_stages = 2, .polynomial = 16},
    {.head_dim = 96, .head_dim_v = 96, .scores = ScoreClass::kMasked,
     .warpgroups = 2, .n = 128, .overlap = Overlap::kWithin, .q_stages = 2},
    {.head_dim = 128, .head_dim_v = 128, .scores = ScoreClass::kUnmasked,
     .warpgroups = 2, .n = 128, .q_stages = 2, .cluster = 2},
    {.head_dim = 128, .head_dim_v = 128, .scores = ScoreClass::kMasked,
     .warpgroups = 2, .n = 128, .q_stages = 2},
    {.head_dim = 192, .head_dim_v = 128, .scores = ScoreClass::kUnmasked,
     .warpgroups = 2, .n = 112, .cluster = 2},
    {.head_dim = 192, .head_dim_v = 128, .scores = ScoreClass::kMasked,
     .warpgroups = 2, .n = 112},
    {.head_dim = 192, .head_dim_v = 192, .scores = ScoreClass::kMasked,
     .warpgroups = 2, .n = 112, .o_apart = false},
    {.head_dim = 256, .head_dim_v = 256, .scores = ScoreClass::kUnmasked,
     .warpgroups = 2, .n = 80, .o_apart = false, .cluster = 2},
    {.head_dim = 256, .head_dim_v = 256, .scores = ScoreClass::kMasked,
     .warpgroups = 2, .n = 80, .o_apart = false},
    {.head_dim = 64, .head_dim_v = 64, .scores = ScoreClass::kModified,
     .warpgroups = 2, .n = 128, .q_stages = 2},
    {.head_dim = 96, .head_dim_v = 96, .scores = ScoreClass::kModified,
     .warpgroups = 2, .n = 128, .q_stages = 2},
    {.head_dim = 128, .head_dim_v = 128, .scores = ScoreClass::kModified,
     .warpgroups = 2, .n = 128, .q_stages = 2},
    {.head_dim = 192, .head_dim_v = 192, .scores = ScoreClass::kModified,
     .warpgroups = 2, .n = 96, .o_apart = false},
    {.head_dim = 256, .head_dim_v = 256, .scores = ScoreClass::kModified,
     .warpgroups = 2, .n = 64, .o_apart = false},
};
// clang-format on

// Of e4m3. Blocks are those of the factors (kDescaleRows).
// clang-format off
inline constexpr Tile kFp8Tiles[] = {
    {.head_dim = 64, .head_dim_v = 64, .scores = ScoreClass::kMasked,
     .warpgroups = 2, .n = 128, .stages = 4, .q_stages = 2, .pv_columns = 64},
    {.head_dim = 128, .head_dim_v = 128, .scores = ScoreClass::kMasked,
     .warpgroups = 2, .n = 128, .overlap = Overlap::kWithin, .stages = 4, .q_stages = 2,
     .pv_columns = 128},
    {.head_dim = 192, .head_dim_v = 128, .scores = ScoreClass::kMasked,
     .warpgroups = 2, .n = 128, .overlap = Overlap::kWithin, .pv_columns = 128},
    {.head_dim = 256, .head_dim_v = 256, .scores = ScoreClass::kMasked,
     .warpgroups = 2, .n = 128, .overlap = Overlap::kApart, .pv_columns = 64},
    {.head_dim = 64, .head_dim_v = 64, .scores = ScoreClass::kModified,
     .warpgroups = 2, .n = 128, .stages = 4, .q_stages = 2, .pv_columns = 64},
    {.head_dim = 128, .head_dim_v = 128, .scores = ScoreClass::kModified,
     .warpgroups = 2, .n = 128, .stages = 4, .q_stages = 2, .pv_columns = 128},
    {.head_dim = 256, .head_dim_v = 256, .scores = ScoreClass::kModified,
     .warpgroups = 2, .n = 128, .overlap = Overlap::kApart, .pv_columns = 64},
};
// clang-format on

constexpr std::span<const Tile> tiles_of(Dtype dtype) {
  if (dtype == Dtype::kFloat8E4M3) return kFp8Tiles;
  return kTiles;
}

constexpr bool has(const Tile& tile, int64_t head_dim, int64_t head_dim_v, ScoreClass scores) {
  return tile.head_dim >= head_dim && tile.head_dim_v >= head_dim_v && tile.scores >= scores;
}

// The first that has head dims 1..kMaxHeadDim and a class of scores.
inline constexpr int kMaxHeadDim = 256;
constexpr const Tile& tile_of(Dtype dtype, int64_t head_dim, int64_t head_dim_v,
                              ScoreClass scores) {
  const std::span<const Tile> tiles = tiles_of(dtype);
  return *std::find_if(tiles.begin(), tiles.end(),
                       [=](const Tile& tile) { return has(tile, head_dim, head_dim_v, scores); });
}

constexpr bool is_valid(const Tile& t) {
  return (t.warpgroups == 2 || t.warpgroups == 3) && t.n % 16 == 0 && t.box_keys() % 8 == 0 &&
         t.n <= 256 && t.head_dim % 32 == 0 && t.head_dim_v % 32 == 0 && t.stages >= 2 &&
         // Dropout's bytes come for 32 keys at a time.
         (t.scores != ScoreClass::kModified || t.n % 32 == 0) &&
         // CTAs of a cluster have the same blocks.
         (t.cluster == 1 || t.scores == ScoreClass::kUnmasked) &&
         // O in Q's place would wait for ever for a second one.
         (t.o_apart || (t.q_stages == 1 && t.head_dim_v <= t.head_dim));
}
static_assert(std::all_of(std::begin(kTiles), std::end(kTiles), is_valid));

constexpr bool is_valid_for_fp8(const Tile& t) {
  return is_valid(t) && t.scores != ScoreClass::kUnmasked && t.m() == kDescaleRows &&
         t.n == kDescaleRows && (t.pv_columns == 64 || t.pv_columns == 128) &&
         t.head_dim_v % t.pv_columns == 0 &&
         // Beside Q K^T there are accumulators for one product alone.
         (t.overlap == Overlap::kApart || t.pv_columns == t.head_dim_v) &&
         // V is transposed in place, by squares (transpose_v.h).
         (t.head_dim_v == 64 || t.head_dim_v % t.n == 0);
}
static_assert(std::all_of(std::begin(kFp8Tiles), std::end(kFp8Tiles), is_valid_for_fp8));

// One kernel. (consteval: device code may call them too.)
struct FwdConfig {
  Dtype dtype;
  int head_dim, head_dim_v;
  ScoreClass scores;

  constexpr bool operator==(const FwdConfig&) const = default;

  consteval Tile tile() const { return tile_of(dtype, head_dim, head_dim_v, scores); }
  consteval bool is_fp8() const { return dtype == Dtype::kFloat8E4M3; }
  consteval Dtype o_dtype() const { return is_fp8() ? Dtype::kBFloat16 : dtype; }
  consteval int m() const { return tile().m(); }
  consteval int n() const { return tile().n; }
  consteval int consumer_warps() const { return 4 * tile().warpgroups; }
  consteval int threads() const { return kWarpgroupThreads * (1 + tile().warpgroups); }
  consteval int cluster() const { return tile().cluster; }
  consteval int ctas_per_sm() const { return 1; }
  // setmaxnreg: of the 64 Ki registers of an SM.
  consteval int producer_registers() const { return tile().warpgroups == 2 ? 40 : 32; }
  consteval int consumer_registers() const { return tile().warpgroups == 2 ? 232 : 160; }
  // Of a warp's tile of scores and outputs: warp/warp_tile.h.
  consteval int row_tiles() const { return 1; }
  consteval int warp_keys() const { return n(); }
  consteval int warp_columns() const { return head_dim_v; }
};

}  // namespace flash::hopper
