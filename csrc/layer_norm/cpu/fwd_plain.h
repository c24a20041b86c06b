// The forward of rows x0, or x0 + residual, whose tensors have one dtype: the sum, its rounding and
// its statistics in one pass over the row, of which the row that is normed stays in the cache.
#pragma once

#include "layer_norm/cpu/row.h"

namespace flash::layer_norm::cpu::FLASH_ATTN_ISA {

FLASH_INLINE bool is_plain(const FwdParams& p) {
  const Dtype t = p.x0.dtype;
  const bool has_factors =
      p.keep.enabled || p.colscale.given() || p.rowscale != nullptr || p.rowscale_const != 1.f;
  return !has_factors && !p.x1.given() && p.x0_subset == nullptr && p.x_dtype == t &&
         (!p.residual.given() || p.residual.dtype == t);
}

// Stores a vector of a row and returns it as it was rounded.
template <Dtype T>
FLASH_INLINE Vec store_rounded(char* row, int64_t i, Constant<kWidth>, Vec v) {
  if constexpr (T == Dtype::kFloat32) {
    store_from_float<T>(row, i, v);
    return v;
  } else {
    const VecU16 h = T == Dtype::kBFloat16 ? float_to_bf16(v) : float_to_fp16(v);
    store_u16(reinterpret_cast<uint16_t*>(row) + i, h);
    return T == Dtype::kBFloat16 ? bf16_to_float(h) : fp16_to_float(h);
  }
}
template <Dtype T>
FLASH_INLINE Vec store_rounded(char* row, int64_t i, int n, Vec v) {
  store_tail<T>(row, i, n, v);
  return load_tail<T>(row, i, n);
}

// Moments about a pivot, a number near the mean: that of the first vector. Where it turns out to be
// far from the mean, two passes over the row in the cache find what is lost.
FLASH_INLINE Statistics statistics_about(const NormParams& p, float* x, float pivot,
                                         const Totals<2>& moments) {
  const float n = static_cast<float>(p.cols);
  const float rest = p.is_rms_norm ? 0.f : moments.of[0] / n;
  const float variance = moments.of[1] / n - rest * rest;
  if (!(rest * rest <= variance) || !(variance < __builtin_inff())) [[unlikely]]
    return statistics_of(x, p.epsilon, p.cols, p.is_rms_norm);
  return {pivot, rest, 1.f / __builtin_sqrtf(variance + p.epsilon)};
}

// Writes the sum to x, as fp32, and where it is wanted.
template <Dtype T, bool kHasResidual, bool kWritesX>
FLASH_INLINE Statistics sum_plain_row(const FwdParams& p, float* x, int64_t row) {
  const RowIn<T> x0{p.x0.row(row), 0.f};
  const RowIn<T> residual{kHasResidual ? p.residual.row(row) : nullptr, 0.f};
  char* const out = kWritesX ? p.x.row(row) : nullptr;
  const auto sum_at = [&](int64_t i, auto n) {
    const Vec v = load_given(x0, i, n);
    if constexpr (kHasResidual) return v + load_given(residual, i, n);
    return v;
  };
  float pivot = 0.f;
  if (!p.is_rms_norm && p.cols >= kWidth)
    pivot = reduce_add(sum_at(0, Constant<kWidth>{})) * (1.f / kWidth);
  const auto moments = sum_row<2>(p.cols, [&](int64_t i, auto n, Vec* s) {
    Vec v = sum_at(i, n);
    if constexpr (kWritesX) {
      v = store_rounded<T>(out, i, n, v);
    } else if constexpr (kHasResidual && T != Dtype::kFloat32) {
      v = T == Dtype::kBFloat16 ? bf16_to_float(float_to_bf16(v)) : fp16_to_float(float_to_fp16(v));
    }
    store(x + i, v);
    const Vec d = first_of(v - pivot, n);
    s[0] += d;
    s[1] = fma(d, d, s[1]);
  });
  return statistics_about(p, x, pivot, moments);
}

template <Dtype T>
FLASH_INLINE Statistics sum_plain_row(const FwdParams& p, float* x, int64_t row) {
  if (p.residual.given())
    return p.x.given() ? sum_plain_row<T, true, true>(p, x, row)
                       : sum_plain_row<T, true, false>(p, x, row);
  return p.x.given() ? sum_plain_row<T, false, true>(p, x, row)
                     : sum_plain_row<T, false, false>(p, x, row);
}

}  // namespace flash::layer_norm::cpu::FLASH_ATTN_ISA
