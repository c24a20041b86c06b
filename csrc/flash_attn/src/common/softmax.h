// The running softmax of one row of scores (FlashAttention, arXiv:2205.14135, algorithm 1), and the
// merge of two.
#pragma once

#include <cmath>

#include "base/host_device.h"

namespace flash {

// Of the scores seen so far: `max` is the largest, `sum` the sum of 2^(c (score - anchor)), where c
// is the scale to base 2. A row that has seen nothing, or nothing but -inf, is {-inf, 0}.
struct RowState {
  float max = -INFINITY;
  float sum = 0.f;

  // What is subtracted from scores: the maximum, or 0 while there is none, since -inf - -inf is not
  // a number.
  FLASH_INLINE float anchor() const { return max == -INFINITY ? 0.f : max; }

  // Takes in the largest of further scores. Returns what the sum, left as it is, and outputs so far
  // must be multiplied by; power(x) = 2^(c x).
  template <class Power>
  FLASH_INLINE float raise(float score, Power power) {
    const float before = max;
    if (score > max) max = score;
    return max == before ? 1.f : power(before - anchor());
  }

  // What the row's unnormalised output is divided by; a row without keys stays 0.
  FLASH_INLINE float inverse_sum() const { return sum == 0.f ? 0.f : 1.f / sum; }

  // log(sum_j exp(scale * score_j)); +inf marks a row without keys.
  FLASH_INLINE float lse(float scale) const {
    return sum == 0.f ? INFINITY : max * scale + logf(sum);
  }
};

// What unnormalised outputs over two disjoint sets of keys are multiplied by to be added.
struct MergeFactors {
  float total, part;
};

// total: the state of its own keys and of part's.
template <class Power>
FLASH_INLINE MergeFactors merge(RowState& total, const RowState& part, Power power) {
  const float scale = total.raise(part.max, power);
  const MergeFactors factors{scale, power(part.max - total.anchor())};
  total.sum = total.sum * factors.total + part.sum * factors.part;
  return factors;
}

}  // namespace flash
