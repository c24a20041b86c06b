// From S and dP of a warp to P and dS. They lie transposed: rows are keys, columns queries.
#pragma once

#include "base/ptx/fragments.h"
#include "base/ptx/math.h"
#include "base/ptx/shared_memory.h"
#include "base/static_for.h"
#include "hopper/bwd_params.h"
#include "hopper/bwd_smem.h"
#include "hopper/mask.h"

namespace flash::hopper {

// What all lanes agree on, which tells the compiler that they do.
template <class T>
FLASH_DEVICE T uniform(T x) {
  return static_cast<T>(__shfl_sync(0xffffffffu, static_cast<int>(x), 0));
}

// A warp's tile of transposed scores, 16 keys and some queries, and what it is multiplied to.
struct KeyRows {
  Dtype dtype;
  int queries, columns;

  consteval int row_tiles() const { return 1; }
  consteval int warp_keys() const { return queries; }
  consteval int warp_columns() const { return columns; }
  struct Terms {
    int n;
  };
  consteval Terms tile() const { return {queries}; }
};

// Where it is: in a slot of the rings, in a block, in a CTA.
template <BwdConfig C>
struct ScorePart {
  const BwdSmemPlan<C>& smem;
  int slot, dout_slot;
  int key;  // its first one, of the CTA's
  int row;  // its first query, of the block's

  // Read again where it is needed: registers are short.
  FLASH_DEVICE const BwdVisit& visit() const { return smem.visits[slot]; }
  FLASH_DEVICE int query() const { return visit().queries.block * C.m() + row; }
};

// The values of a lane's two queries of n8 tile n.
FLASH_DEVICE float2 pair_of(const float* values, int n) {
  const int first = ptx::accumulator_element(ptx::read_tid_x() % 32, 0).col;
  return ptx::load_shared_2_floats(ptx::shared_address(values) + (n * 8 + first) * 4);
}

// f(n, pair) of all of them.
template <int kTiles, class F>
FLASH_DEVICE void for_each_pair(const float* values, const F& f) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) f(n, pair_of(values, n));
}

// Scores become logarithms of weights, to base 2.
template <BwdConfig C, int kTiles>
FLASH_DEVICE void logits(float (&rS)[1][kTiles][4], const ScorePart<C>& part, float scale_log2) {
  const float* references = part.smem.reference[part.slot] + part.row;
  if (!uniform(part.visit().has_far)) {
    for_each_pair<kTiles>(references, [&](int n, float2 reference) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        rS[0][n][i] = fmaf(rS[0][n][i], scale_log2, i % 2 ? reference.y : reference.x);
    });
    return;
  }
  const float* scores = part.smem.far_score[part.slot] + part.row;
  for_each_pair<kTiles>(references, [&](int n, float2 reference) {
    const float2 far = pair_of(scores, n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float score = i % 2 ? far.y : far.x, limit = score != 0.f ? 0.f : INFINITY;
      rS[0][n][i] =
          fminf(fmaf(rS[0][n][i] - score, scale_log2, i % 2 ? reference.y : reference.x), limit);
    }
  });
}

// A hidden pair's number becomes 0, whatever it is: by a bit for each of a lane's numbers of a key.
template <BwdConfig C, int kTiles>
FLASH_DEVICE void hide(float (&r)[1][kTiles][4], const ScorePart<C>& part) {
  if (uniform(part.visit().is_full)) return;
  const KeyTile& here = part.smem.tile;
  const ptx::Element first = ptx::accumulator_element(ptx::read_tid_x() % 32, 0);
  const int query = part.query() + first.col;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = here.first_key + part.key + first.row + 8 * half;
    const QueryRange queries = here.mask.queries(key, key);
    const uint32_t seen = low_bits(columns_below(queries.end - query)) &
                          ~low_bits(columns_below(queries.begin - query));
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if ((seen & 1u << (2 * n + i)) == 0) r[0][n][2 * half + i] = 0.f;
  }
}

// P of S.
template <BwdConfig C, int kTiles>
FLASH_DEVICE void weigh(float (&rS)[1][kTiles][4], const ScorePart<C>& part, float scale_log2) {
  logits(rS, part, scale_log2);
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) rS[0][n][i] = ptx::ex2(rS[0][n][i]);
  hide(rS, part);
}

// dS of dP.
template <BwdConfig C, int kTiles>
FLASH_DEVICE void slopes(float (&rdP)[1][kTiles][4], const float (&rP)[1][kTiles][4],
                         const ScorePart<C>& part) {
  for_each_pair<kTiles>(part.smem.delta[part.dout_slot] + part.row, [&](int n, float2 delta) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      rdP[0][n][i] = rP[0][n][i] * (rdP[0][n][i] - (i % 2 ? delta.y : delta.x));
  });
  hide(rdP, part);
}

template <Dtype kDtype, int kTiles>
FLASH_DEVICE void pack_scores(uint32_t (&to)[1][kTiles][2], const float (&r)[1][kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      to[0][n][half] = ptx::pack<kDtype>(r[0][n][2 * half], r[0][n][2 * half + 1]);
}

// Writes them to a tile, keys x queries, from chunk `chunk` of the warp's keys' rows on. A lane
// addresses the row of 16 bytes that holds its row of four 8 x 8 blocks.
template <class S, int kTiles>
FLASH_DEVICE void store_scores(uint32_t tile, int key, int chunk,
                               const uint32_t (&r)[1][kTiles][2]) {
  const ptx::Chunk at = ptx::a_chunk(ptx::read_tid_x() % 32);
  const uint32_t first = tile + S::offset(key + at.row, chunk + at.chunk);
  static_for<kTiles / 2>([&](auto pair) {
    const uint32_t x[4] = {r[0][2 * pair][0], r[0][2 * pair][1], r[0][2 * pair + 1][0],
                           r[0][2 * pair + 1][1]};
    ptx::stmatrix_x4<0>(first ^ S::flip(pair), x);
  });
}

// Which queries see a key, as a mask whose rows are keys.
struct QueriesOfKeys {
  const Mask& mask;

  FLASH_DEVICE KeyRange keys(int key) const {
    const QueryRange queries = mask.queries(key, key);
    return {queries.begin, queries.end};
  }
};

}  // namespace flash::hopper
