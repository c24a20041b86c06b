// What the backward subtracts from the scores of rows that are far from 0 (common/far_rows.h): the
// largest score of the row and the logarithm of its sum, found before the main kernel walks.
//
// Near 1e9 scores that are summed in another order differ by more than exp can bear. So the scores
// are those of the main kernel to the bit: the same instructions on the same operands, of a class
// FarScores<dtype> of the device's, and the same functions behind it. Made for being simple: there
// are few such rows, and operands are fetched element by element.
#pragma once

#include <cfloat>

#include "base/ptx/fragments.h"
#include "base/ptx/special_registers.h"
#include "base/row_config.h"
#include "warp/bwd_params.h"
#include "warp/score.h"
#include "warp/sink.h"

namespace flash {

// A warp's tile of scores: 16 queries, 8 keys.
struct FarTile {
  Dtype dtype;

  static consteval int row_tiles() { return 1; }
  static consteval int warp_keys() { return 8; }
  static consteval int warp_columns() { return 8; }
};

// Elements `column` and column + 1 of a row of `columns`, 0 beyond; of no row, null, 0.
// `aligned`: rows are chunks of 16 bytes.
FLASH_DEVICE uint32_t load_pair(const char* row, int column, int columns, bool aligned) {
  if (row == nullptr || column >= columns) return 0;
  const auto* elements = reinterpret_cast<const uint16_t*>(row) + column;
  if (aligned) return *reinterpret_cast<const uint32_t*>(elements);
  return elements[0] | (column + 1 < columns ? elements[1] << 16 : 0);
}

// 16 queries of one head.
struct FarBlock {
  const Sequence& seq;
  const Mask& mask;
  int head, first_query;
};

// The states of a lane's two rows take in a tile of scores, times `sign`. `scale_log2` is positive.
FLASH_DEVICE void add_scores(RowState (&states)[2], const float (&rS)[4], float sign,
                             float scale_log2, const FarBlock& rows, int first_key) {
  const auto power = [=](float x) { return ptx::ex2(x * scale_log2); };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const ptx::Element at = ptx::accumulator_element(ptx::read_tid_x() % 32, i);
    const KeyRange keys = rows.mask.keys(rows.first_query + at.row);
    const int key = first_key + at.col;
    if (key < keys.begin || key >= keys.end) continue;
    RowState& state = states[i / 2];
    const float score = sign * rS[i];
    state.sum *= state.raise(score, power);
    state.sum += power(score - state.anchor());
  }
}

// Completes a row's state over the lanes that share it, and over the warps of the CTA: in those
// threads whose number is that of a row.
template <int kWarps, class Power>
FLASH_DEVICE RowState merge_rows(RowState (&states)[2], const Power& power) {
  __shared__ float2 parts[kWarps][kPrepareRows];
  const int lane = ptx::read_tid_x() % 32, warp = ptx::read_tid_x() / 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    RowState& state = states[half];
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
      merge(state,
            {__shfl_xor_sync(0xffffffffu, state.max, step),
             __shfl_xor_sync(0xffffffffu, state.sum, step)},
            power);
    const ptx::Element at = ptx::accumulator_element(lane, 2 * half);
    if (at.col == 0) parts[warp][at.row] = {state.max, state.sum};
  }
  __syncthreads();
  RowState total;
  if (ptx::read_tid_x() < kPrepareRows)
    for (const auto& part : parts) {
      const float2 x = part[ptx::read_tid_x()];
      merge(total, {x.x, x.y}, power);
    }
  return total;
}

// log(exp(x) + exp(y)).
FLASH_DEVICE float log_add(float x, float y) { return fmaxf(x, y) + log1pf(expf(-fabsf(x - y))); }

// Of a row whose largest score is `score`, its sum `sum`, its sink `sink`. A row that others hold
// keys of is normalised by softmax_lse.
FLASH_DEVICE RowReference far_reference(float score, float sum, float scale, float sink,
                                        float lse) {
  float log_sum = logf(sum);
  if (sink != -INFINITY) log_sum = log_add(log_sum, fmaf(-score, scale, sink));
  if (is_own_lse(lse, fmaf(score, scale, log_sum))) return {score, log_sum};
  return {score, -fmaf(score, scale, -lse)};
}

// The states of a block's rows, of sign * scores: in those threads whose number is that of a row.
// FarScores multiplies kKeys keys at a time, by all warps, of which each then takes every so
// many-th 8 of them.
template <RowConfig C, template <Dtype> class FarScores>
FLASH_DEVICE RowState far_states(const BwdParams& p, const BwdPrepareLaunch& launch,
                                 const FarBlock& rows, float sign) {
  constexpr FarTile kTile{C.dtype};
  constexpr int kWarps = C.threads() / 32, kKeys = FarScores<C.dtype>::kKeys;
  const float scale_log2 = fmaxf(fabsf(launch.scale_log2), FLT_MIN);
  const int last = min(rows.first_query + kPrepareRows, rows.seq.seqlen_q) - 1;
  const KeyRange keys = rows.mask.keys(rows.first_query, last);
  RowState states[2];
  const FarScores<C.dtype> scores(p, launch, rows);
  for (int first = keys.begin / 8 * 8; first < keys.end; first += kKeys) {
    scores.multiply(first);
    for (int within = ptx::read_tid_x() / 32 * 8; within < kKeys; within += 8 * kWarps) {
      const int key = first + within;
      if (key >= keys.end) break;
      typename WarpTile<kTile>::Scores rS;
      scores.load(rS[0][0], first, within);
      if (launch.modifies_scores)
        modify_scores<kTile>(rS, p, {rows.seq.batch, rows.head, rows.first_query, rows.mask}, key);
      add_scores(states, rS[0][0], sign, scale_log2, rows, key);
    }
  }
  return merge_rows<kWarps>(states, [=](float x) { return ptx::ex2(x * scale_log2); });
}

// References of the far ones of 16 rows; the whole CTA comes.
template <RowConfig C, template <Dtype> class FarScores>
FLASH_DEVICE void store_references(const BwdParams& p, const BwdPrepareLaunch& launch,
                                   const Sequence& seq, int head, int first_query) {
  const int row = ptx::read_tid_x() % kPrepareRows, query = first_query + row;
  const bool exists = query < seq.seqlen_q;
  const float lse = exists ? p.softmax_lse[seq.batch * p.lse_batch_stride +
                                           head * p.lse_head_stride + seq.lse_row + query]
                           : 0.f;
  if (!__any_sync(0xffffffffu, fabsf(lse) > kFarLse)) return;
  const float sign = launch.scale < 0.f ? -1.f : 1.f;
  const Mask mask = mask_of(p, seq);
  const RowState state = far_states<C, FarScores>(p, launch, {seq, mask, head, first_query}, sign);
  if (ptx::read_tid_x() >= kPrepareRows || !(fabsf(lse) > kFarLse)) return;
  launch.references.at(seq, head, query) =
      is_far(lse) && state.max > -INFINITY
          ? far_reference(sign * state.max, state.sum, launch.scale, sink_logit(p, head), lse)
          : RowReference{0.f, lse};
}

}  // namespace flash
