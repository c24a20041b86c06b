// From Q, K, V and dO to P and dS: what the backward's kernels do with a block of scores.
#pragma once

#include "common/block_range.h"
#include "sm80/bwd_load.h"
#include "sm80/tile_gemm.h"
#include "warp/score.h"

namespace flash::sm80 {

// A warp's part of a block of scores.
template <BwdConfig C>
struct ScoreTile {
  static constexpr int kKeyWarps = C.tile().s_key_warps;
  int row, key;  // the first ones, of the block

  FLASH_DEVICE explicit ScoreTile(int warp)
      : row(warp / kKeyWarps * C.warp_rows()), key(warp % kKeyWarps * C.warp_keys()) {}
};

// lse or delta of each of a lane's rows of scores.
template <BwdConfig C>
using RowValues = float[WarpTile<C>::kM][2];

template <BwdConfig C>
FLASH_DEVICE void load_rows(RowValues<C>& r, uint32_t values, const ScoreTile<C>& part, int lane) {
#pragma unroll
  for (int m = 0; m < WarpTile<C>::kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      r[m][half] =
          __uint_as_float(ptx::load_shared(values + 4 * (part.row + m * 16 + half * 8 + lane / 4)));
}

// f(x, m, n, i) of each of a warp's scores.
template <BwdConfig C, class F>
FLASH_DEVICE void for_each(typename WarpTile<C>::Scores& r, const F& f) {
#pragma unroll
  for (int m = 0; m < WarpTile<C>::kM; ++m)
#pragma unroll
    for (int n = 0; n < WarpTile<C>::kS; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) f(r[m][n][i], m, n, i);
}

// What a warp computes of a block of scores.
template <BwdConfig C>
struct BwdScores {
  using W = WarpTile<C>;
  using Plan = BwdSmemPlan<C>;
  using Stage = typename Plan::Stage;

  ScoreTile<C> part;
  typename W::Scores s;   // S, then logits
  typename W::Scores dp;  // dP, then dP - delta
  RowValues<C> lse;
  Kept<C> kept;

  // S = Q K^T and dP = dO V^T.
  FLASH_DEVICE BwdScores(uint32_t smem, uint32_t stage, int warp, int lane) : part(warp) {
    const ptx::Chunk a = ptx::a_chunk(lane), b = ptx::b_chunk_n_major(lane);
    const uint32_t rows = Plan::Q::offset(part.row + a.row, a.chunk);
    const uint32_t keys = Plan::K::offset(part.key + b.row, b.chunk);
    const auto multiply = [&](typename W::Scores& r, uint32_t of_rows, uint32_t of_keys) {
      clear(r);
      gemm<C.dtype, C.head_dim / 16>(r, SumAlongRows<typename Plan::Q>{of_rows + rows},
                                     SumAlongRows<typename Plan::K>{of_keys + keys});
    };
    multiply(s, stage + offsetof(Stage, q), smem + offsetof(Plan, k));
    multiply(dp, stage + offsetof(Stage, dout), smem + offsetof(Plan, v));
    load_rows<C>(lse, stage + offsetof(Stage, lse), part, lane);
  }

  // dP -= delta, after dropout; then what softcap, ALiBi and bias do to both, but for the softcap's
  // slope where kHasSlope is false: that of logits.
  template <bool kHasSlope>
  FLASH_DEVICE void modify(uint32_t stage, const BwdParams& p, const BwdLaunch& launch,
                           const KeyTile& here, const QueryBlock& queries) {
    RowValues<C> delta;
    load_rows<C>(delta, stage + offsetof(Stage, delta), part, this_lane<C>());
    if constexpr (C.scores == ScoreClass::kModified) drop_dp(p, launch, here, queries);
    for_each<C>(dp, [&](float& x, int m, int, int i) { x -= delta[m][i / 2]; });
    if constexpr (C.scores == ScoreClass::kModified) {
      if (!launch.modifies_scores) return;
      const ScorePlace place{here.seq.batch, queries.head, first_row(queries), here.mask};
      modify_scores<C>(s, p, place, first_key(here), [&](auto& capped) {
        if (!kHasSlope) return;
        const float inverse = 1.f / p.softcap;
        for_each<C>(capped, [&](float x, int m, int n, int i) {
          const float t = x * inverse;
          dp[m][n][i] *= fmaf(-t, t, 1.f);
        });
      });
    }
  }

  // emit(m, n, half, P, dS) of each pair of neighbouring scores; both 0 where the key is hidden.
  template <class Emit>
  FLASH_DEVICE void softmax_bwd_step(const BwdLaunch& launch, const KeyTile& here,
                                     const QueryBlock& queries, bool is_full, const Emit& emit) {
    if (is_full) {
      step(launch, here, queries, emit, [](int, int) { return [](int) { return true; }; });
      return;
    }
    const ptx::Element first = ptx::accumulator_element(this_lane<C>(), 0);
    const int row = first_row(queries) + first.row, key = first_key(here) + first.col;
    step(launch, here, queries, emit, [&](int m, int half) {
      const int query = row + m * 16 + half * 8;
      const KeyRange keys = here.mask.keys(query);
      const int begin = keys.begin - key;
      const int end = query < here.mask.seqlen_q ? keys.end - key : begin;
      return [=](int column) { return begin <= column && column < end; };
    });
  }

  FLASH_DEVICE int first_row(const QueryBlock& queries) const {
    return queries.block * C.tile().m + part.row;
  }
  FLASH_DEVICE int first_key(const KeyTile& here) const { return here.first_key + part.key; }

 private:
  FLASH_DEVICE void drop_dp(const BwdParams& p, const BwdLaunch& launch, const KeyTile& here,
                            const QueryBlock& queries) {
    if (!launch.dropout.enabled) return;
    draw<C>(kept, launch.dropout, static_cast<uint32_t>(here.seq.batch * p.h + queries.head),
            first_row(queries), first_key(here));
    for_each<C>(dp, [&](float& x, int m, int n, int i) {
      x = kept[m][n] >> (8 * i + 7) & 1u ? x * launch.dropout.rescale : 0.f;
    });
  }

  // Of a row far from 0: scores become logarithms of weights, to base 2; none of these is above 1.
  FLASH_DEVICE void subtract_reference(int m, int half, const BwdLaunch& launch,
                                       const KeyTile& here, const QueryBlock& queries) {
    const int row = m * 16 + ptx::accumulator_element(ptx::read_tid_x() % 32, 2 * half).row;
    const RowReference reference = launch.references.at(here.seq, ptx::opaque(queries.head),
                                                        ptx::opaque(first_row(queries)) + row);
    const float log2_sum = reference.log_sum * kLog2e;
#pragma unroll
    for (int n = 0; n < W::kS; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[m][n][2 * half + i];
        x = fminf(fmaf(x - reference.score, launch.scale_log2, -log2_sum), 0.f);
      }
  }

  template <class Emit, class Seen>
  FLASH_DEVICE void step(const BwdLaunch& launch, const KeyTile& here, const QueryBlock& queries,
                         const Emit& emit, const Seen& seen) {
#pragma unroll
    for (int m = 0; m < W::kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto sees = seen(m, half);
        float scale_log2 = launch.scale_log2, reference = -lse[m][half] * kLog2e;
        if (fabsf(lse[m][half]) > kFarLse) {
          subtract_reference(m, half, launch, here, queries);
          scale_log2 = 1.f;
          reference = 0.f;
        }
#pragma unroll
        for (int n = 0; n < W::kS; ++n) {
          float weight[2], slope[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float x = ptx::ex2(fmaf(s[m][n][2 * half + i], scale_log2, reference));
            weight[i] = sees(n * 8 + i) ? x : 0.f;
            slope[i] = sees(n * 8 + i) ? x * dp[m][n][2 * half + i] : 0.f;
          }
          emit(m, n, half, weight, slope);
        }
      }
    }
  }
};

// A lane's address of its first score in a tile of shared memory.
template <BwdConfig C>
FLASH_DEVICE uint32_t score_address(uint32_t tile, const ScoreTile<C>& part, int lane) {
  const ptx::Element first = ptx::accumulator_element(lane, 0);
  return tile + first.col * kElementBytes +
         BwdSmemPlan<C>::P::offset(part.row + first.row, part.key / kChunkElements);
}

// Writes a warp's scores, packed; `first`: score_address. The permutation of chunks is the same in
// every eighth row, and a warp's n8 tiles are an aligned power of two of chunks.
template <BwdConfig C>
FLASH_DEVICE void store_scores(uint32_t first, const typename WarpTile<C>::Probabilities& r) {
  using W = WarpTile<C>;
  static_assert((W::kS & (W::kS - 1)) == 0);
#pragma unroll
  for (int n = 0; n < W::kS; ++n) {
    const uint32_t column = first ^ n * kChunkBytes;
#pragma unroll
    for (int i = 0; i < W::kM * 2; ++i)
      ptx::store_shared(column + i * 8 * BwdSmemPlan<C>::P::kRowBytes, r[i / 2][n][i % 2]);
  }
}

// P and dS of a block, in shared memory.
template <BwdConfig C>
FLASH_DEVICE void recompute(uint32_t smem, uint32_t stage, const BwdParams& p,
                            const BwdLaunch& launch, const KeyTile& here, const QueryBlock& queries,
                            bool is_full) {
  using W = WarpTile<C>;
  using Plan = BwdSmemPlan<C>;
  BwdScores<C> scores(smem, stage, this_warp<C>(), this_lane<C>());
  scores.template modify<true>(stage, p, launch, here, queries);
  typename W::Probabilities rP, rdS;
  scores.softmax_bwd_step(launch, here, queries, is_full,
                          [&](int m, int n, int half, const float* weight, const float* slope) {
                            rP[m][n][half] = ptx::pack<C.dtype>(weight[0], weight[1]);
                            rdS[m][n][half] = ptx::pack<C.dtype>(slope[0], slope[1]);
                          });
  if constexpr (C.scores == ScoreClass::kModified) {
    if (launch.dropout.enabled) drop<C>(rP, scores.kept);
  }
  const uint32_t first = score_address(smem + offsetof(Plan, p), scores.part, this_lane<C>());
  store_scores<C>(first, rP);
  store_scores<C>(first + (offsetof(Plan, ds) - offsetof(Plan, p)), rdS);
}

}  // namespace flash::sm80
