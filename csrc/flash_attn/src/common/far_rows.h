// Rows of the backward whose softmax_lse is so far from 0 that fp32 does not hold it exactly
// enough.
//
// P = exp(x - lse) has a relative error of 2^-24 |lse|: of fully masked rows with a bias of -1e9,
// where lse = -1e9 + log(6) is -1e9 in fp32, P would be 1 instead of 1/6, and a score that forward
// and backward round differently would be e^64 times too large. For such rows the backward first
// finds the largest score and the sum of the weights with its own arithmetic, and P is
// exp((x - score) - log_sum).
#pragma once

#include <cmath>

#include "base/host_device.h"

namespace flash {

inline constexpr float kFarLse = 1024.f;

FLASH_INLINE bool is_far(float lse) { return fabsf(lse) > kFarLse && fabsf(lse) < INFINITY; }

struct RowReference {
  float score, log_sum;
};

// Whether softmax_lse is the row's own `own_lse` as far as it can tell: whoever attends over the
// keys in parts passes that of all of them, which is larger. Forward and backward may sum a product
// in different orders; where softmax_lse has no bits for what other keys add, the worst order is
// allowed for.
FLASH_INLINE bool is_own_lse(float lse, float own_lse) {
  const float magnitude = fabsf(lse);
  const float slack = magnitude * (magnitude < 0x1p20f ? 0x1p-22f : 0x1p-16f);
  return own_lse >= lse - slack;
}

}  // namespace flash
