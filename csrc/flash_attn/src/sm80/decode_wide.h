// Attention over few or many keys with head dims up to 576, those of V up to 512, forward, for
// compute capability 8.0 and newer. Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)
// decodes so: 576 = 512 + 64, one key-value head, and values that are a part of the keys.
//
// An output of 16 x 512 is too much for one warp, so that the four warps of a CTA, unlike those of
// decode.h, share every block of 16 keys. Of the rest the CTA does the same, for the same tiles of
// 16 rows of (query, head) and the same units of keys (decode_tile.h).
//
//   S = Q K^T    a warp multiplies a quarter of the head dim, 16 columns of each 64, which it has
//   of
//                Q in registers: its 16 x 16 shares of the sums go to shared memory, and each warp
//                adds up the four
//   softmax      each warp for itself: all have the same rows, so that P need not be exchanged
//   O += P V     a warp has a quarter of V's columns
//
// Two barriers a block: the block has landed, the shares of the scores are there. Blocks pass
// through a ring of three slots of 18 KiB (decode_wide_load.h); two CTAs fit on an SM of compute
// capability 8.0, one into 99 KiB of shared memory. Where V is the first columns of K's rows, it is
// read from K's slot, and memory is read once for both.
//
// A block of a warp takes 34 mma, of which rows / 16 is of use; 17 ldmatrix; 10 accesses of 512
// bytes for the exchange of scores; and, with V within K, 9 copies of 512 bytes.
#pragma once

#include "sm80/decode_score.h"
#include "sm80/decode_tile.h"
#include "sm80/decode_wide_load.h"
#include "sm80/steps.h"
#include "warp/contain.h"
#include "warp/decode_query.h"
#include "warp/merge_accumulators.h"
#include "warp/rows.h"

namespace flash::sm80 {

// A warp's quarter of Q as operand A, and its product with K.
template <DecodeConfig C>
class QuerySlice {
 public:
  FLASH_DEVICE QuerySlice(uint32_t sQ, int warp, int lane)
      : flip_(Q::flip(warp)), lane_(ptx::b_chunk_n_major(lane)) {
    const uint32_t mine = lane_address<Q>(sQ, ptx::a_chunk(lane)) ^ flip_;
    static_for<Q::kGroups>([&](auto g) { ptx::ldmatrix_x4<g * Q::kGroupBytes>(rQ_[g], mine); });
  }

  // rS: the warp's share of Q sK^T.
  FLASH_DEVICE void multiply(typename WarpTile<C>::Scores& rS, uint32_t sK) const {
    const uint32_t mine = lane_address<K>(sK, lane_) ^ flip_;
#pragma unroll
    for (int n = 0; n < WarpTile<C>::kS; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) rS[0][n][i] = 0.f;
    static_for<K::kGroups>([&](auto g) {
      static_for<WarpTile<C>::kS / 2>([&](auto n) {
        uint32_t rK[4];
        ptx::ldmatrix_x4<n * 16 * K::kRowBytes + g * K::kGroupBytes>(rK, mine);
        ptx::mma_m16n8k16<C.dtype>(rS[0][2 * n], rQ_[g], rK[0], rK[1]);
        ptx::mma_m16n8k16<C.dtype>(rS[0][2 * n + 1], rQ_[g], rK[2], rK[3]);
      });
    });
  }

 private:
  using Q = typename SmemPlan<C>::Q;
  using K = typename SmemPlan<C>::K;

  uint32_t flip_;  // to the warp's columns of each group
  ptx::Chunk lane_;
  uint32_t rQ_[Q::kGroups][4];
};

// The sums of the warps' shares of scores.
template <DecodeConfig C>
class ScoreSum {
 public:
  FLASH_DEVICE ScoreSum(SmemPlan<C>& plan, int warp, int lane)
      : plan_(plan), warp_(warp), lane_(lane) {}

  FLASH_DEVICE void put(const typename WarpTile<C>::Scores& rS) const {
#pragma unroll
    for (int n = 0; n < WarpTile<C>::kS; ++n)
      share(warp_, n) = make_float4(rS[0][n][0], rS[0][n][1], rS[0][n][2], rS[0][n][3]);
  }

  // After all warps have put theirs. The same sums in each.
  FLASH_DEVICE void get(typename WarpTile<C>::Scores& rS) const {
#pragma unroll
    for (int n = 0; n < WarpTile<C>::kS; ++n) {
      float4 sum = share(0, n);
#pragma unroll
      for (int w = 1; w < C.tile().warps; ++w) {
        const float4 x = share(w, n);
        sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
      }
      rS[0][n][0] = sum.x;
      rS[0][n][1] = sum.y;
      rS[0][n][2] = sum.z;
      rS[0][n][3] = sum.w;
    }
  }

 private:
  FLASH_DEVICE float4& share(int warp, int n) const {
    return *reinterpret_cast<float4*>(plan_.scores[warp][n][lane_]);
  }

  SmemPlan<C>& plan_;
  int warp_, lane_;
};

// A warp's columns of units' results, as accumulators. All warps have the same states.
template <DecodeConfig C>
class Slice {
 public:
  typename WarpTile<C>::Output output = {};
  typename WarpTile<C>::Rows rows;

  FLASH_DEVICE Slice() { clear_rows<C>(rows); }

  // Merges in the next unit.
  FLASH_DEVICE void take(const Slice& unit, float scale_log2) {
    merge_accumulators<C>(
        output, rows, unit.rows, scale_log2, [&](int n) { return accumulators_of(output, n); },
        [&](int n) { return accumulators_of(unit.output, n); });
  }

  // Keeps the tile's rows of a unit in the workspace.
  FLASH_DEVICE void store(const Unit& to, int warp, int lane, int rows_of_tile) const {
    for_each_row(warp, lane, [&](int half, int row, int column) {
      if (row >= rows_of_tile) return;
      if (column == 0) to.states[row] = rows[0][half];
      float* first = to.outputs + row * to.row_stride + column;
      for_each_pair(half,
                    [&](int n, float2 x) { __stcg(reinterpret_cast<float2*>(first + n * 8), x); });
    });
  }

  // Gives the tile's rows to the threads that will write them, through shared memory.
  FLASH_DEVICE void hand_over(Total<C>& total, SmemPlan<C>& plan, int warp, int lane) const {
    for_each_row(warp, lane, [&](int half, int row, int column) {
      if (column == 0) plan.states[row] = rows[0][half];
      const uint32_t first = ptx::shared_address(&plan.output[row][column]);
      for_each_pair(half, [&](int n, float2 x) { ptx::store_shared(first + n * 32, x); });
    });
    __syncthreads();
    using Q = Quads<C>;
    total.state = plan.states[Q::row()];
#pragma unroll
    for (int i = 0; i < Q::kCount; ++i) {
      const uint4 x =
          ptx::load_shared_16_bytes(ptx::shared_address(&plan.output[Q::row()][Q::column(i)]));
      total.output[i] = make_float4(__uint_as_float(x.x), __uint_as_float(x.y),
                                    __uint_as_float(x.z), __uint_as_float(x.w));
    }
  }

 private:
  // f(half, row, its first column) of this lane's rows.
  template <class F>
  FLASH_DEVICE static void for_each_row(int warp, int lane, const F& f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const ptx::Element first = ptx::accumulator_element(lane, 2 * half);
      f(half, first.row, warp * C.warp_columns() + first.col);
    }
  }

  // f(n, two elements in a row, n * 8 columns from the first) of a row.
  template <class F>
  FLASH_DEVICE void for_each_pair(int half, const F& f) const {
#pragma unroll
    for (int n = 0; n < WarpTile<C>::kO; ++n)
      f(n, make_float2(output[0][n][2 * half], output[0][n][2 * half + 1]));
  }
};

// What the steps over a block need to know beside its keys.
template <DecodeConfig C>
struct WideSteps {
  const FwdParams& p;
  const DecodeLaunch& launch;
  const DecodePlace<C>& here;
  const BlockRange& seen;
  int warp, lane;

  FLASH_DEVICE bool is_full(int key) const {
    return seen.full_begin <= key && key + C.tile().n <= seen.full_end;
  }

  // From scores to probabilities, and the output to the new maxima.
  FLASH_DEVICE void soften(typename WarpTile<C>::Probabilities& rP, Slice<C>& unit,
                           typename WarpTile<C>::Scores& rS, int key) const {
    float rescale[1][2];
    if (launch.modifies_scores) modify_scores<C>(rS, p, here, key);
    if (!is_full(key)) apply_mask<C>(rS, here.mask, here.first_row, key);
    softmax_step<C>(rP, rescale, rS, unit.rows, launch.scale_log2);
    if (launch.dropout.enabled) drop<C>(rP, launch.dropout, static_cast<int>(p.h), here, key);
    rescale_o<C>(unit.output, rescale);
  }

  FLASH_DEVICE void accumulate(Slice<C>& unit, const typename WarpTile<C>::Probabilities& rP,
                               uint32_t sV, int key) const {
    using V = typename SmemPlan<C>::V;
    const uint32_t mine = sV + warp * (C.warp_columns() / V::kGroupCols) * V::kGroupBytes;
    if (!is_full(key) && !is_finite<C>(mine)) {
      gemm_pv_by_keys<C, V>(unit.output, rP, mine, here.mask, here.first_row, key);
    } else {
      gemm_pv<C>(unit.output, rP, lane_address<V>(mine, ptx::b_chunk_k_major(lane)));
    }
  }
};

// This CTA's units: merged into `total` if it has the tile for itself, else kept in the workspace.
template <DecodeConfig C>
FLASH_DEVICE void attend_wide_units(Total<C>& total, const FwdParams& p, const DecodeLaunch& launch,
                                    const DecodePlace<C>& here, const KeyUnits<C>& units,
                                    SmemPlan<C>& plan) {
  const int lane = ptx::read_tid_x() % 32;
  const int warp = __shfl_sync(0xffffffffu, ptx::read_tid_x() / 32, 0);  // known to be uniform
  const uint32_t sQ = ptx::shared_address(&plan) + SmemPlan<C>::q_offset();
  load_q<C, typename SmemPlan<C>::Q>(p, launch, here, sQ);
  SharedBlocks<C> keys(p, launch, here, units, ptx::shared_address(plan.ring));
  ptx::cp_async_wait_group<C.tile().stages - 1>();
  __syncthreads();
  prepare_q<C, typename SmemPlan<C>::Q>(p, launch, here, sQ, [] { __syncthreads(); });
  const QuerySlice<C> q(sQ, warp, lane);
  const WideSteps<C> steps{p, launch, here, units.seen, warp, lane};
  const ScoreSum<C> sum(plan, warp, lane);
  Slice<C> merged;
  for (int number = units.mine.begin; number < units.mine.end; ++number) {
    Slice<C> unit;
    for (int block = number * units.blocks_of_unit; block < units.end_block(number); ++block) {
      typename WarpTile<C>::Scores rS;
      typename WarpTile<C>::Probabilities rP;
      const int key = keys.key(block);
      const uint32_t sK = keys.next_k(block);
      q.multiply(rS, sK);
      sum.put(rS);
      const uint32_t sV = keys.next_v(block, sK);
      sum.get(rS);
      steps.soften(rP, unit, rS, key);
      steps.accumulate(unit, rP, sV, key);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) unit.rows[0][half].sum = quad_sum(unit.rows[0][half].sum);
    if (units.mine.sharers == 1) {
      merged.take(unit, launch.scale_log2);
    } else {
      unit.store(kept_unit<C>(launch, here.tile, number), warp, lane, here.rows);
    }
  }
  if (units.mine.sharers > 1) return;
  __syncthreads();  // all warps have left the ring
  merged.hand_over(total, plan, warp, lane);
}

template <DecodeConfig C>
FLASH_DEVICE void mha_decode_wide(const FwdParams& p, const DecodeLaunch& launch) {
  extern __shared__ __align__(1024) char smem[];
  auto& plan = *reinterpret_cast<SmemPlan<C>*>(smem);
  decode_tile<C>(p, launch, plan,
                 [&](Total<C>& total, const DecodePlace<C>& here, const KeyUnits<C>& units) {
                   attend_wide_units<C>(total, p, launch, here, units, plan);
                 });
}

}  // namespace flash::sm80
