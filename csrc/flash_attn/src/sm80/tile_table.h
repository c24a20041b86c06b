// How a kernel cuts its work, for each bucket of head dims.
#pragma once

#include <algorithm>
#include <iterator>

#include "common/flash.h"

namespace flash::sm80 {

// Masks that cost instructions: kNone hides nothing but what lies beyond the last key.
enum class MaskClass { kNone, kCausalLocal };

struct Tile {
  int head_dim;  // of this bucket: head dims up to it are filled up with zeros
  MaskClass mask;
  int m, n;         // queries of a CTA, keys of a block
  int warps;        // each owns m / warps queries
  int stages;       // slots of the ring that K and V blocks pass through
  int ctas_per_sm;  // what registers and shared memory are held to
};

// Two CTAs of 128 threads leave each thread 255 registers. d = 64 without a mask: 128 accumulators
// for scores and 64 for the output; under a mask blocks of 64 keys, which waste less along the
// diagonal. d = 128: 64 and 128 accumulators, and 80 KiB of shared memory a CTA.
inline constexpr Tile kTiles[] = {
    {.head_dim = 64,
     .mask = MaskClass::kNone,
     .m = 128,
     .n = 128,
     .warps = 4,
     .stages = 3,
     .ctas_per_sm = 2},
    {.head_dim = 64,
     .mask = MaskClass::kCausalLocal,
     .m = 128,
     .n = 64,
     .warps = 4,
     .stages = 3,
     .ctas_per_sm = 2},
    {.head_dim = 128,
     .mask = MaskClass::kNone,
     .m = 128,
     .n = 64,
     .warps = 4,
     .stages = 3,
     .ctas_per_sm = 2},
    {.head_dim = 128,
     .mask = MaskClass::kCausalLocal,
     .m = 128,
     .n = 64,
     .warps = 4,
     .stages = 3,
     .ctas_per_sm = 2},
};
inline constexpr int kMaxHeadDim = 128;

// The smallest bucket that holds `head_dim`, 1..kMaxHeadDim.
constexpr const Tile& tile_of(int64_t head_dim, MaskClass mask) {
  const Tile* tile = kTiles;
  while (tile->head_dim < head_dim || tile->mask != mask) ++tile;
  return *tile;
}

constexpr bool is_valid(const Tile& t) {
  return t.m % (t.warps * 16) == 0 && t.n % 16 == 0 && t.head_dim % 64 == 0 &&
         // A step fetches a block of the tensor that it reads: see pipeline.h.
         t.stages >= 3 && t.stages % 2 == 1;
}
static_assert(std::all_of(std::begin(kTiles), std::end(kTiles), is_valid));

// One kernel. (consteval: device code may call them too.)
struct FwdConfig {
  Dtype dtype;
  int head_dim;
  MaskClass mask;

  constexpr bool operator==(const FwdConfig&) const = default;

  consteval Tile tile() const { return tile_of(head_dim, mask); }
  consteval int threads() const { return 32 * tile().warps; }
  consteval int ctas_per_sm() const { return tile().ctas_per_sm; }
  consteval int rows_per_warp() const { return tile().m / tile().warps; }
  consteval int row_tiles() const { return rows_per_warp() / 16; }  // m16 tiles of a warp
};

}  // namespace flash::sm80
