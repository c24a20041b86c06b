// A row of queries on its way through the forward: read, then the state of its softmax.
#pragma once

#include "common/softmax.h"
#include "cpu/append.h"
#include "cpu/descale.h"
#include "cpu/scores.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// Row `index` of map in fp32, rotated, padded with zeros to d_pad.
inline void read_query(const Flash_fwd_params& p, const Sequence& seq, const RowMap& map, int index,
                       float* q, int d_pad) {
  read_row(p.dtype, q, map.tensor_row(p.q, index), static_cast<int>(p.d), d_pad);
  if (p.rotary_dim > 0) {
    const bool positions_differ = p.window_left >= 0 || p.window_right >= 0;
    rotate_row(p, q, seq.cached + (positions_differ ? map.query(index) : 0));
  }
}
// The same, scaled by softmax_scale, its own factor and `factor`.
inline void read_scaled_query(const Flash_fwd_params& p, const Sequence& seq, const RowMap& map,
                              int index, const RowFactors& factors, float factor, float* q,
                              int d_pad) {
  read_query(p, seq, map, index, q, d_pad);
  const float scale = p.scale_softmax * (factors.of(map.query(index)) * factor);
  for (int i = 0; i < d_pad; i += kWidth) store(q + i, load(q + i) * scale);
}

// States on the CPU are of natural scores.
inline constexpr auto natural_power = [](float x) { return exp(x); };

// Scores s[begin, end), multiples of 2 kWidth apart, raise a row's maximum; returns the factor that
// what was summed before must be scaled by.
FLASH_INLINE float raise_maximum(const float* s, int begin, int end, RowState& state) {
  Vec largest[2] = {set1(-kInf), set1(-kInf)};
#pragma GCC unroll 2
  for (int j = begin; j < end; j += 2 * kWidth) {
    largest[0] = max(largest[0], load(s + j));
    largest[1] = max(largest[1], load(s + j + kWidth));
  }
  // As state.raise, but without a branch, which nobody could predict.
  const float before = state.max, after = reduce_max(max(largest[0], largest[1]));
  state.max = after > before ? after : before;
  const float scale = exp(before - state.anchor());
  state.sum *= scale;
  return scale;
}
// The scores become P, and add to the row's sum. Scores are natural, and the reference is
// subtracted before anything multiplies them: near it the difference is exact, however large both
// are.
FLASH_INLINE void weigh_scores(float* s, int begin, int end, RowState& state) {
  const Vec reference = set1(state.anchor());
  Vec sum = zero();
#pragma GCC unroll 4
  for (int j = begin; j < end; j += kWidth) {
    const Vec p = exp(load(s + j) - reference);
    sum += p;
    store(s + j, p);
  }
  state.sum += reduce_add(sum);
}
// Both. Of several rows, raise the maxima of all first: they do not wait for each other.
FLASH_INLINE float flash_step(float* s, int begin, int end, RowState& state) {
  const float scale = raise_maximum(s, begin, end, state);
  weigh_scores(s, begin, end, state);
  return scale;
}

// Adds the sink of `head`, a key without value; returns the factor that what was summed before must
// be scaled by.
inline float add_sink(const ScoreParams& p, int head, RowState& state) {
  return merge(state, {sink_logit(p, head), 1.f}, natural_power).total;
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
