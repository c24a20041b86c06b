// Rows of the backward whose softmax_lse is so far from 0 that fp32 does not hold it exactly
// enough.
//
// P = exp(x - lse) has a relative error of 2^-24 |lse|: of fully masked rows with a bias of -1e9,
// where lse = -1e9 + log(6) is -1e9 in fp32, P would be 1 instead of 1/6, and a score that forward
// and backward round differently would be e^64 times too large. For such rows the backward first
// finds the largest score and the sum of the weights with its own arithmetic, and P is
// exp((x - score) - log_sum).
#pragma once

#include "cpu/row_state.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr float kFarLse = 1024.f;

FLASH_INLINE bool is_far(float lse) {
  return __builtin_fabsf(lse) > kFarLse && __builtin_fabsf(lse) < kInf;
}

struct RowReference {
  float score, log_sum;
};

// [b, h, seqlen_q], written where rows are far; null if none is.
struct FarRows {
  RowReference* references = nullptr;
  int64_t h = 0, seqlen_q = 0;

  FLASH_INLINE RowReference& at(int batch, const Row& row) const {
    return references[(batch * h + row.head) * seqlen_q + row.query];
  }
};

// How much less than softmax_lse a row's own may be and still be the same: forward and backward may
// sum a product in different orders. Where softmax_lse has no bits for what other keys add, the
// worst order is allowed for.
inline float lse_slack(float lse) {
  const float magnitude = __builtin_fabsf(lse);
  return magnitude * (magnitude < 0x1p20f ? 0x1p-22f : 0x1p-16f);
}

// Of a row with these scores. Whoever attends over the keys in parts passes the softmax_lse of all
// of them: a row is normalised by its own sum only if that is what softmax_lse is.
inline RowReference far_reference(RowState state, float lse) {
  const bool is_own = state.lse(1.f) >= lse - lse_slack(lse);
  return is_own ? RowReference{state.max, __builtin_logf(state.sum)} : RowReference{lse, 0.f};
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
