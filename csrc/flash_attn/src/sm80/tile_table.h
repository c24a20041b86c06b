// How a kernel cuts its work, for each bucket of head dims.
#pragma once

#include "common/flash.h"

namespace flash::sm80 {

struct Tile {
  int head_dim;     // of this bucket: head dims up to it are filled up with zeros
  int m, n;         // queries of a CTA, keys of a block
  int warps;        // each owns m / warps queries
  int stages;       // slots of the ring that K and V blocks pass through
  int ctas_per_sm;  // what registers and shared memory are held to
};

// d =  64: 48 + 32 + 64 accumulator and operand registers leave three CTAs on an SM.
// d = 128: 128 output and 64 score accumulators a thread; two CTAs on an SM, 80 KiB of shared
// memory
//          each. A third one would need fewer than 168 registers.
inline constexpr Tile kTiles[] = {
    {.head_dim = 64, .m = 128, .n = 64, .warps = 4, .stages = 3, .ctas_per_sm = 2},
    {.head_dim = 128, .m = 128, .n = 64, .warps = 4, .stages = 3, .ctas_per_sm = 2},
};
inline constexpr int kMaxHeadDim = 128;

// The smallest bucket that holds `head_dim`, 1..kMaxHeadDim.
constexpr const Tile& tile_of(int64_t head_dim) {
  return head_dim <= kTiles[0].head_dim ? kTiles[0] : kTiles[1];
}

constexpr bool is_valid(const Tile& t) {
  return t.m % (t.warps * 16) == 0 && t.n % 16 == 0 && t.head_dim % 64 == 0 &&
         // A step fetches the block of the tensor that it reads: see pipeline.h.
         t.stages >= 3 && t.stages % 2 == 1;
}
static_assert(is_valid(kTiles[0]) && is_valid(kTiles[1]));
static_assert(kTiles[1].head_dim == kMaxHeadDim);

// Masks that cost instructions: kNone hides nothing but what lies beyond the last key.
enum class MaskClass { kNone, kCausalLocal };

// One kernel. (consteval: device code may call them too.)
struct FwdConfig {
  Dtype dtype;
  int head_dim;
  MaskClass mask;

  constexpr bool operator==(const FwdConfig&) const = default;

  consteval Tile tile() const { return tile_of(head_dim); }
  consteval int threads() const { return 32 * tile().warps; }
  consteval int rows_per_warp() const { return tile().m / tile().warps; }
  consteval int row_tiles() const { return rows_per_warp() / 16; }  // m16 tiles of a warp
};

}  // namespace flash::sm80
