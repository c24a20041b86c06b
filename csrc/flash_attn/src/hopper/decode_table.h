// How the decode kernel cuts its work, for each bucket of head dims.
#pragma once

#include <algorithm>
#include <iterator>

#include "common/split_heuristic.h"
#include "hopper/tile_size.h"

namespace flash::hopper {

struct DecodeTile {
  int head_dim, head_dim_v;  // smaller ones are filled up with zeros
  int n;                     // keys of a slot: those that a warpgroup multiplies with Q
  int warpgroups;            // that share a block, a slot each, and the columns of the output
  int stages;                // slots of the rings of K and of V
  bool v_within_k;           // V is the first columns of K, and has no ring
  bool total_in_shared;      // of units merged so far; or in the workspace
  int ctas_per_sm;           // what registers and shared memory have room for
  UnitSizes units = {.least = 256, .most = 1024, .few = 32};
  int polynomial = 0;  // softmax.h

  constexpr int block_keys() const { return n * warpgroups; }
};

// A unit's result, 64 rows of fp32, is 256 head_dim_v bytes, which go to L2 and back; that of 256
// keys of d = 128 is a quarter of what is read for it. Where the output is four times as wide and K
// serves for V, units are longer. docs/hopper.md has the sums.
// clang-format off
inline constexpr DecodeTile kDecodeTiles[] = {
    {.head_dim = 64, .head_dim_v = 64, .n = 64, .warpgroups = 1, .stages = 4,
     .v_within_k = false, .total_in_shared = true, .ctas_per_sm = 2},
    {.head_dim = 128, .head_dim_v = 128, .n = 64, .warpgroups = 1, .stages = 2,
     .v_within_k = false, .total_in_shared = true, .ctas_per_sm = 2},
    {.head_dim = 256, .head_dim_v = 256, .n = 64, .warpgroups = 1, .stages = 2,
     .v_within_k = false, .total_in_shared = true, .ctas_per_sm = 1},
    {.head_dim = 576, .head_dim_v = 512, .n = 32, .warpgroups = 2, .stages = 4,
     .v_within_k = true, .total_in_shared = false, .ctas_per_sm = 1,
     .units = {.least = 512, .most = 4096, .few = 16}},
};
// clang-format on

constexpr bool is_valid(const DecodeTile& t) {
  return t.units.least % t.block_keys() == 0 && t.head_dim % 64 == 0 &&
         t.head_dim_v % (64 * t.warpgroups) == 0 && t.head_dim_v <= t.head_dim &&
         t.head_dim_v / t.warpgroups <= 256 && t.stages % t.warpgroups == 0 && t.n % 16 == 0;
}
static_assert(std::all_of(std::begin(kDecodeTiles), std::end(kDecodeTiles),
                          [](const DecodeTile& t) { return is_valid(t); }));

// One kernel.
struct DecodeConfig {
  Dtype dtype;
  int head_dim, head_dim_v;

  constexpr bool operator==(const DecodeConfig&) const = default;

  consteval DecodeTile tile() const {
    for (const DecodeTile& tile : kDecodeTiles)
      if (tile.head_dim == head_dim && tile.head_dim_v == head_dim_v) return tile;
    return {};
  }
  consteval int rows() const { return kWarpgroupRows; }  // of a CTA, (query, head)
  consteval int consumer_warps() const { return 4 * tile().warpgroups; }
  consteval int consumers() const { return 32 * consumer_warps(); }
  consteval int q_threads() const { return consumers(); }                    // that load Q
  consteval int threads() const { return consumers() + kWarpgroupThreads; }  // with the producers
  // setmaxnreg: of the 64 Ki registers of an SM. One CTA of two warpgroups needs none: each thread
  // has as many as an instruction can name.
  consteval bool moves_registers() const { return tile().ctas_per_sm * threads() > 256; }
  consteval int producer_registers() const { return tile().warpgroups == 2 ? 40 : 56; }
  consteval int consumer_registers() const { return tile().warpgroups == 2 ? 232 : 200; }
  consteval int ctas_per_sm() const { return tile().ctas_per_sm; }
  consteval int block_keys() const { return tile().block_keys(); }
  consteval UnitSizes units() const { return tile().units; }
  // Of a warp's tile of scores and outputs: warp/warp_tile.h.
  consteval int row_tiles() const { return 1; }
  consteval int warp_keys() const { return tile().n; }
  consteval int warp_columns() const { return head_dim_v / tile().warpgroups; }
};

}  // namespace flash::hopper
