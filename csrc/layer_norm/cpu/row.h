// Steps over one row that lies in the first-level cache as fp32. Row buffers are whole vectors
// long.
#pragma once

#include <algorithm>

#include "base/cpu/parallel.h"
#include "base/cpu/philox.h"
#include "base/cpu/row_access.h"
#include "base/cpu/scratch.h"
#include "layer_norm/params.h"

namespace flash::layer_norm::cpu::FLASH_ATTN_ISA {

using namespace flash::cpu::FLASH_ATTN_ISA;  // NOLINT(google-build-using-namespace)
using flash::cpu::Carver;
using flash::cpu::Scratch;

// Elements of a row buffer: whole vectors, and all that one call of the generator makes.
FLASH_INLINE int64_t padded(int64_t cols) {
  constexpr int64_t kStep = 4 * kWidth;
  return (cols + kStep - 1) / kStep * kStep;
}

// Lanes below n, the others 0.
FLASH_INLINE Vec first_of(Vec v, Constant<kWidth>) { return v; }
FLASH_INLINE Vec first_of(Vec v, int n) { return select(iota() < n, v, zero()); }

// load_from and store_to of rows that are known to be given.
template <Dtype T>
FLASH_INLINE Vec load_given(const RowIn<T>& row, int64_t i, Constant<kWidth>) {
  return load_as_float<T>(row.ptr, i);
}
template <Dtype T>
FLASH_INLINE Vec load_given(const RowIn<T>& row, int64_t i, int n) {
  return load_tail<T>(row.ptr, i, n);
}
template <Dtype T>
FLASH_INLINE void store_given(char* row, int64_t i, Constant<kWidth>, Vec v) {
  store_from_float<T>(row, i, v);
}
template <Dtype T>
FLASH_INLINE void store_given(char* row, int64_t i, int n, Vec v) {
  store_tail<T>(row, i, n, v);
}

// Calls body(i, n, sums) for all vectors of a row, where it adds to sums[kCount]: to four sets of
// them in turn. Returns their totals.
template <int kCount>
struct Totals {
  float of[kCount];
};
template <int kCount, class Body>
FLASH_INLINE Totals<kCount> sum_row(int64_t cols, const Body& body) {
  constexpr int kSets = 4;
  Vec sums[kSets][kCount] = {};
  int64_t i = 0;
  for (; i + kSets * kWidth <= cols; i += kSets * kWidth)
    static_for<kSets>([&](auto set) { body(i + set * kWidth, Constant<kWidth>{}, sums[set]); });
  for_vectors(i, cols, [&](int64_t j, auto n) { body(j, n, sums[0]); });
  Totals<kCount> totals;
  for (int k = 0; k < kCount; ++k)
    totals.of[k] = reduce_add((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]));
  return totals;
}

// Fetches a row that is read later, along with the columns of the row at hand: memory would be
// idle while that is in the cache.
struct NextRow {
  const char* row = nullptr;  // null: none
  int64_t bytes = 0;          // of an element

  FLASH_INLINE NextRow(const TypedMatrix& m, int64_t i, int64_t rows) {
    if (m.given() && i < rows) row = m.row(i), bytes = dtype_bytes(m.dtype);
  }
  FLASH_INLINE void fetch(int64_t column) const { __builtin_prefetch(row + column * bytes); }
};

// ------------------------------------------------------------------------------------------------
// Dropout

// Rescaled 1 or 0 for each column of a row of a branch.
FLASH_INLINE void keep_factors(float* keep, const KeepRule& rule, Branch branch, int64_t row,
                               int64_t cols) {
  alignas(64) uint16_t random[4 * kWidth];
  const VecI threshold = set1i(static_cast<int32_t>(rule.threshold));
  for (int64_t i = 0; i < cols; i += 4 * kWidth) {
    philox_4x32_7(rule.key, static_cast<uint32_t>(i / KeepRule::kColumns),
                  static_cast<uint32_t>(row), static_cast<uint32_t>(branch), rule.offset, random);
    static_for<4>([&](auto k) {
      const VecI bits = __builtin_convertvector(load_u16(random + k * kWidth), VecI);
      store(keep + i + k * kWidth, select(bits < threshold, set1(rule.rescale), zero()));
    });
  }
}

FLASH_INLINE void write_mask(const Matrix& mask, int64_t row, const float* keep, int64_t cols) {
  if (mask.ptr == nullptr) return;
  char* out = mask.row(row, 4);
  for (int64_t i = 0; i < cols; ++i) out[i] = keep[i] != 0.f;
  for (int64_t i = cols; i % 4 != 0; ++i) out[i] = 0;
}

// ------------------------------------------------------------------------------------------------
// Sums of branches

// What a summand is multiplied by; null: nothing.
struct Factors {
  float scale = 1.f;
  const float *col = nullptr, *keep = nullptr;

  FLASH_INLINE bool are_one() const { return scale == 1.f && col == nullptr && keep == nullptr; }
  // What is dropped is 0 whatever it was.
  FLASH_INLINE Vec times(Vec v, int64_t i) const {
    v *= scale;
    if (col != nullptr) v *= load(col + i);
    if (keep == nullptr) return v;
    const Vec k = load(keep + i);
    return select(k != 0.f, v * k, zero());
  }
};

// Calls body(times) with times(v, i) the product of column i's v and the factors.
template <class Body>
FLASH_INLINE void with_factors(const Factors& factors, const Body& body) {
  if (factors.are_one()) return body([](Vec v, int64_t) { return v; });
  body([&](Vec v, int64_t i) { return factors.times(v, i); });
}

template <bool kFirst>
FLASH_INLINE void add_row(float* x, const TypedMatrix& m, int64_t row, const Factors& factors,
                          int64_t cols) {
  with_dtype(m.dtype, [&]<Dtype T>() {
    const RowIn<T> in{m.row(row), 0.f};
    with_factors(factors, [&](const auto& times) {
      for_vectors(0, cols, [&](int64_t i, auto n) {
        const Vec v = times(load_given(in, i, n), i);
        store(x + i, kFirst ? v : load(x + i) + v);
      });
    });
  });
}

FLASH_INLINE void write_row(const TypedMatrix& m, int64_t row, const float* x,
                            const Factors& factors, int64_t cols) {
  if (!m.given()) return;
  with_dtype(m.dtype, [&]<Dtype T>() {
    char* const out = m.row(row);
    with_factors(factors, [&](const auto& times) {
      for_vectors(0, cols,
                  [&](int64_t i, auto n) { store_given<T>(out, i, n, times(load(x + i), i)); });
    });
  });
}

// ------------------------------------------------------------------------------------------------
// Statistics

struct Statistics {
  float mean = 0.f;  // as it is kept
  float rest = 0.f;  // what is to be subtracted after the mean
  float rstd = 0.f;
};

struct Moments {
  float mean = 0.f, rest = 0.f, variance = 0.f;
};

// Two passes; the second also finds what rounding left in the mean of the first.
FLASH_INLINE Moments centred_moments(const float* x, int64_t cols) {
  const float n = static_cast<float>(cols);
  const float mean =
      sum_row<1>(cols, [&](int64_t i, auto, Vec* s) { s[0] += load(x + i); }).of[0] / n;
  const auto moments = sum_row<2>(cols, [&](int64_t i, auto count, Vec* s) {
    const Vec d = first_of(load(x + i) - mean, count);
    s[0] += d;
    s[1] = fma(d, d, s[1]);
  });
  const float rest = moments.of[0] / n;
  return {mean, rest, std::max(moments.of[1] / n - rest * rest, 0.f)};
}

FLASH_INLINE Moments moments_about_0(const float* x, int64_t cols) {
  const auto square = sum_row<1>(
      cols, [&](int64_t i, auto, Vec* s) { s[0] = fma(load(x + i), load(x + i), s[0]); });
  return {.variance = square.of[0] / static_cast<float>(cols)};
}

FLASH_INLINE Moments moments_of(const float* x, int64_t cols, bool is_rms_norm) {
  return is_rms_norm ? moments_about_0(x, cols) : centred_moments(x, cols);
}

// Of a row whose squares fp32 does not hold: those of the row scaled by a power of two, beside
// whose variance epsilon is nothing. Inf and NaN stay what they are.
__attribute__((noinline)) inline Statistics statistics_of_large(float* x, float epsilon,
                                                                int64_t cols, bool is_rms_norm) {
  constexpr float kShrink = 0x1p-80f, kGrow = 0x1p80f;
  for (int64_t i = 0; i < cols; i += kWidth) store(x + i, load(x + i) * kShrink);
  const Moments m = moments_of(x, cols, is_rms_norm);
  for (int64_t i = 0; i < cols; i += kWidth) store(x + i, load(x + i) * kGrow);
  const float rstd =
      m.variance == 0.f ? 1.f / __builtin_sqrtf(epsilon) : kShrink / __builtin_sqrtf(m.variance);
  return {m.mean * kGrow, m.rest * kGrow, rstd};
}

FLASH_INLINE Statistics statistics_of(float* x, float epsilon, int64_t cols, bool is_rms_norm) {
  const Moments m = moments_of(x, cols, is_rms_norm);
  if (!(m.variance < __builtin_inff())) [[unlikely]]
    return statistics_of_large(x, epsilon, cols, is_rms_norm);
  return {m.mean, m.rest, 1.f / __builtin_sqrtf(m.variance + epsilon)};
}

// ------------------------------------------------------------------------------------------------
// Weights

// Vectors of the columns as fp32 for all rows, in row buffers. Weights that are not given are 1,
// biases 0; colscale: null where not given.
struct Columns {
  const float *weight, *bias, *weight1, *bias1, *colscale;
};

inline const float* take_columns(Carver& carver, const TypedMatrix& m, float plus, float absent,
                                 int64_t cols) {
  float* to = carver.take<float>(padded(cols));
  if (m.given()) add_row<true>(to, m, 0, {}, cols);
  for (int64_t i = 0; i < cols; ++i) to[i] = m.given() ? to[i] + plus : absent;
  return to;
}

inline size_t columns_bytes(int64_t cols) { return 5 * padded(cols) * sizeof(float); }

inline Columns take_columns(Carver& carver, const NormParams& p) {
  const DefaultFloats floats;
  const float plus = p.zero_centered_weight ? 1.f : 0.f;
  const auto take = [&](const TypedMatrix& m, float added, float absent) {
    return take_columns(carver, m, added, absent, p.cols);
  };
  return {take(p.weight, plus, 1.f), take(p.bias, 0.f, 0.f), take(p.weight1, plus, 1.f),
          take(p.bias1, 0.f, 0.f), p.colscale.given() ? take(p.colscale, 0.f, 1.f) : nullptr};
}

// A factor of a row of x0.
FLASH_INLINE float scale_of(const NormParams& p, int64_t row) {
  if (p.rowscale == nullptr) return p.rowscale_const;
  return p.rowscale_const * load_scalar(p.rowscale, p.rowscale_dtype, row);
}

// Rows of a task, so many that a task is worth handing out.
FLASH_INLINE int64_t rows_of_task(int64_t cols) {
  constexpr int64_t kElements = 16384;
  return std::max<int64_t>(kElements / cols, 1);
}

inline int threads_for_rows(const NormParams& p) {
  return flash::cpu::threads_for(20. * static_cast<double>(p.rows) * static_cast<double>(p.cols));
}

}  // namespace flash::layer_norm::cpu::FLASH_ATTN_ISA
