// The backward of rows with one output and one gradient beside those of weight and bias, all but
// these of one dtype. Some rows go together, so that sums over rows are read and written once for
// all of them; both passes read the rows as they are, the second from the cache, rather than keep
// what the first has made of them.
#pragma once

#include <array>

#include "layer_norm/cpu/row.h"

namespace flash::layer_norm::cpu::FLASH_ATTN_ISA {

inline constexpr int kRowsTogether = kWidth == 16 ? 4 : 2;

FLASH_INLINE bool is_plain(const BwdParams& p) {
  const Dtype t = p.x.dtype;
  const bool has_factors =
      p.keep.enabled || p.colscale.given() || p.rowscale != nullptr || p.rowscale_const != 1.f;
  const bool has_more = p.dout1.given() || p.dx1.given() || p.dresidual.given() || p.out.given();
  const bool in_order = p.x0_subset == nullptr && p.out_subset == nullptr;
  return !has_factors && !has_more && in_order && p.dx0.given() && p.dx0.dtype == t &&
         p.dout.dtype == t && (!p.dx.given() || p.dx.dtype == t);
}

// Of a row: what its elements are made of.
template <Dtype T>
struct PlainRow {
  RowIn<T> x, dout;
  float mean, rstd;

  FLASH_INLINE PlainRow(const BwdParams& p, int64_t row)
      : x{p.x.row(row), 0.f},
        dout{p.dout.row(row), 0.f},
        mean(p.mean == nullptr ? 0.f : p.mean[row]),
        rstd(p.rstd[row]) {}

  template <class N>
  FLASH_INLINE Vec norm_at(int64_t i, N n) const {
    return (load_given(x, i, n) - mean) * rstd;
  }
};

// The sums over the columns of kRows rows; adds to those over rows.
template <Dtype T, int kRows>
FLASH_INLINE void sum_plain_rows(const PlainRow<T>* rows, const float* weight, float* dweight,
                                 float* dbias, int64_t cols, float* g_of, float* gx_of) {
  Vec g_sums[kRows] = {}, gx_sums[kRows] = {};
  for_vectors(0, cols, [&](int64_t i, auto n) {
    const Vec w = load(weight + i);
    Vec dw = load(dweight + i), db = load(dbias + i);
    static_for<kRows>([&](auto r) {
      const Vec norm = rows[r].norm_at(i, n), dy = load_given(rows[r].dout, i, n);
      dw = fma(dy, norm, dw);
      db += dy;
      const Vec g = dy * w;
      g_sums[r] += g;
      gx_sums[r] = fma(g, norm, gx_sums[r]);
    });
    store(dweight + i, dw);
    store(dbias + i, db);
  });
  for (int r = 0; r < kRows; ++r) {
    g_of[r] = reduce_add(g_sums[r]);
    gx_of[r] = reduce_add(gx_sums[r]);
  }
}

template <Dtype T, bool kHasDx>
FLASH_INLINE void write_plain_row(const BwdParams& p, const PlainRow<T>& row, const float* weight,
                                  float mean_g, float mean_gx, int64_t at) {
  const RowIn<T> dx{kHasDx ? p.dx.row(at) : nullptr, 0.f};
  const NextRow x(p.x, at + kRowsTogether, p.rows), dout(p.dout, at + kRowsTogether, p.rows);
  char* const out = p.dx0.row(at);
  for_vectors(0, p.cols, [&](int64_t i, auto n) {
    const Vec g = load_given(row.dout, i, n) * load(weight + i);
    Vec v = (g - mean_g - row.norm_at(i, n) * mean_gx) * row.rstd;
    if constexpr (kHasDx) v += load_given(dx, i, n);
    store_given<T>(out, i, n, v);
    x.fetch(i);
    dout.fetch(i);
  });
}

template <Dtype T, int kRows>
FLASH_INLINE void bwd_plain_rows(const BwdParams& p, const float* weight, float* dweight,
                                 float* dbias, int64_t first) {
  const auto rows = [&]<int... kRow>(std::integer_sequence<int, kRow...>) {
    return std::array<PlainRow<T>, kRows>{PlainRow<T>(p, first + kRow)...};
  }(std::make_integer_sequence<int, kRows>{});
  float g[kRows], gx[kRows];
  sum_plain_rows<T, kRows>(rows.data(), weight, dweight, dbias, p.cols, g, gx);
  const float n = static_cast<float>(p.cols);
  for (int r = 0; r < kRows; ++r) {
    const float mean_g = p.is_rms_norm ? 0.f : g[r] / n, mean_gx = gx[r] / n;
    p.dx.given() ? write_plain_row<T, true>(p, rows[r], weight, mean_g, mean_gx, first + r)
                 : write_plain_row<T, false>(p, rows[r], weight, mean_g, mean_gx, first + r);
  }
}

// dweight, dbias: sums over rows that take these in addition.
inline void bwd_plain(const BwdParams& p, const float* weight, float* dweight, float* dbias,
                      int64_t first, int64_t end) {
  with_dtype(p.x.dtype, [&]<Dtype T>() {
    int64_t row = first;
    for (; row + kRowsTogether <= end; row += kRowsTogether)
      bwd_plain_rows<T, kRowsTogether>(p, weight, dweight, dbias, row);
    for (; row < end; ++row) bwd_plain_rows<T, 1>(p, weight, dweight, dbias, row);
  });
}

}  // namespace flash::layer_norm::cpu::FLASH_ATTN_ISA
