// How a kernel cuts its work, for each bucket of head dims.
#pragma once

#include <algorithm>
#include <iterator>

#include "common/flash.h"
#include "warp/score_class.h"

namespace flash::sm80 {

struct Tile {
  int head_dim, head_dim_v;  // smaller ones are filled up with zeros
  ScoreClass scores;
  int m, n;             // queries of a CTA, keys of a block
  int warps = 4;        // each owns m / warps queries
  int stages = 3;       // slots of the ring that K and V blocks pass through
  int ctas_per_sm = 2;  // what registers and shared memory are held to
};

// In the order of their costs: a call takes the first that has what it needs.
//
// Two CTAs of 128 threads leave each thread 255 registers. A warp of 32 queries holds n scores and
// head_dim_v elements of the output a lane: at d = 64 without a mask 128 and 64; under a mask
// blocks of 64 keys, which waste less along the diagonal; at d = 128 64 and 128. Above that 16
// queries, since an output of 32 would fill the registers. Shared memory holds m rows of Q and
// three blocks: 80 KiB at most, so that a device with 99 KiB for a CTA runs them all, and one with
// 163 KiB or more two of them on an SM.
inline constexpr Tile kTiles[] = {
    {.head_dim = 32, .head_dim_v = 32, .scores = ScoreClass::kMasked, .m = 128, .n = 64},
    {.head_dim = 64, .head_dim_v = 64, .scores = ScoreClass::kUnmasked, .m = 128, .n = 128},
    {.head_dim = 64, .head_dim_v = 64, .scores = ScoreClass::kMasked, .m = 128, .n = 64},
    {.head_dim = 96, .head_dim_v = 96, .scores = ScoreClass::kMasked, .m = 128, .n = 64},
    {.head_dim = 128, .head_dim_v = 128, .scores = ScoreClass::kMasked, .m = 128, .n = 64},
    {.head_dim = 192, .head_dim_v = 128, .scores = ScoreClass::kMasked, .m = 64, .n = 48},
    {.head_dim = 192, .head_dim_v = 192, .scores = ScoreClass::kMasked, .m = 64, .n = 48},
    {.head_dim = 256, .head_dim_v = 256, .scores = ScoreClass::kMasked, .m = 64, .n = 32},
    {.head_dim = 32, .head_dim_v = 32, .scores = ScoreClass::kModified, .m = 128, .n = 64},
    {.head_dim = 64, .head_dim_v = 64, .scores = ScoreClass::kModified, .m = 128, .n = 64},
    {.head_dim = 96, .head_dim_v = 96, .scores = ScoreClass::kModified, .m = 128, .n = 32},
    {.head_dim = 128, .head_dim_v = 128, .scores = ScoreClass::kModified, .m = 128, .n = 32},
    {.head_dim = 192, .head_dim_v = 192, .scores = ScoreClass::kModified, .m = 64, .n = 32},
    {.head_dim = 256, .head_dim_v = 256, .scores = ScoreClass::kModified, .m = 64, .n = 32},
};

constexpr bool has(const Tile& tile, int64_t head_dim, int64_t head_dim_v, ScoreClass scores) {
  return tile.head_dim >= head_dim && tile.head_dim_v >= head_dim_v && tile.scores >= scores;
}

// The first that has head dims 1..256 and a class of scores.
constexpr const Tile& tile_of(int64_t head_dim, int64_t head_dim_v, ScoreClass scores) {
  return *std::find_if(std::begin(kTiles), std::end(kTiles),
                       [=](const Tile& tile) { return has(tile, head_dim, head_dim_v, scores); });
}

constexpr bool is_valid(const Tile& t) {
  return t.m % (t.warps * 16) == 0 && t.n % 16 == 0 && t.head_dim % 32 == 0 &&
         t.head_dim_v % 32 == 0 &&
         // Dropout's bytes come for 32 keys at a time.
         (t.scores != ScoreClass::kModified || t.n % 32 == 0) &&
         // A step fetches a block of the tensor that it reads: see pipeline.h.
         t.stages >= 3 && t.stages % 2 == 1;
}
static_assert(std::all_of(std::begin(kTiles), std::end(kTiles), is_valid));

// One kernel. (consteval: device code may call them too.)
struct FwdConfig {
  Dtype dtype;
  int head_dim, head_dim_v;
  ScoreClass scores;

  constexpr bool operator==(const FwdConfig&) const = default;

  consteval Tile tile() const {
    for (const Tile& tile : kTiles)
      if (tile.head_dim == head_dim && tile.head_dim_v == head_dim_v && tile.scores == scores)
        return tile;
    return {};
  }
  consteval int threads() const { return 32 * tile().warps; }
  consteval int ctas_per_sm() const { return tile().ctas_per_sm; }
  consteval int rows_per_warp() const { return tile().m / tile().warps; }
  consteval int warp_keys() const { return tile().n; }
  consteval int row_tiles() const { return rows_per_warp() / 16; }  // m16 tiles of a warp
  consteval int warp_columns() const { return head_dim_v; }         // of the output
};

}  // namespace flash::sm80
