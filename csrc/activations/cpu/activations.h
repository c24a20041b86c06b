// Activation functions on the CPU: each element is read once and written once, so that memory is
// the bound. A task is a piece of one or more rows.
#pragma once

#include <algorithm>

#include "activations/functions.h"
#include "base/cpu/parallel.h"
#include "base/cpu/row_access.h"
#include "base/cpu/scratch.h"

namespace flash::activations::cpu::FLASH_ATTN_ISA {

using namespace flash::cpu::FLASH_ATTN_ISA;  // NOLINT(google-build-using-namespace)

struct VecMath {
  using F = Vec;

  FLASH_INLINE static Vec exp(Vec x) {
    return flash::cpu::FLASH_ATTN_ISA::exp(select(x > 88.f, set1(88.f), x));
  }
  FLASH_INLINE static Vec tanh(Vec x) { return flash::cpu::FLASH_ATTN_ISA::tanh(x); }
  FLASH_INLINE static Vec reciprocal(Vec x) { return 1.f / x; }
  FLASH_INLINE static Vec max_0(Vec x) { return select(x <= 0.f, zero(), x); }
  FLASH_INLINE static Vec step(Vec x) { return select(x > 0.f, set1(1.f), zero()); }
  FLASH_INLINE static Vec clamp(Vec x, float limit) {
    const Vec low = select(x < -limit, set1(-limit), x);
    return select(low > limit, set1(limit), low);
  }
};

template <Dtype T, class F>
FLASH_INLINE void fwd_row(const Params& p, const F& f, int64_t row, int64_t first, int64_t end) {
  const auto x = row_in<T>(p.x, row, 0.f), bias = row_in<T>(p.bias, row, 0.f);
  const auto y = row_in<T>(p.y, row, 1.f);
  const auto out = row_out<T>(p.out, row);
  for_vectors(first, end, [&](int64_t i, auto n) {
    const Vec value = f(VecMath{}, load_from(x, i, n) + load_from(bias, i, n)).value;
    store_to(out, i, n, value * load_from(y, i, n));
  });
}

template <Dtype T, class F>
FLASH_INLINE void bwd_row(const Params& p, const F& f, int64_t row, int64_t first, int64_t end) {
  const auto x = row_in<T>(p.x, row, 0.f), bias = row_in<T>(p.bias, row, 0.f);
  const auto y = row_in<T>(p.y, row, 1.f), dout = row_in<T>(p.dout, row, 0.f);
  const auto dx = row_out<T>(p.dx, row), dy = row_out<T>(p.dy, row);
  for_vectors(first, end, [&](int64_t i, auto n) {
    const auto [value, slope] = f(VecMath{}, load_from(x, i, n) + load_from(bias, i, n));
    const Vec g = load_from(dout, i, n), gate = load_from(y, i, n);
    store_to(dx, i, n, g * gate * slope);
    store_to(dy, i, n, g * value);
  });
}

// The pieces that tasks are: `rows` rows, `cols` columns of them.
struct Pieces {
  static constexpr int64_t kElements = 16384;
  int64_t rows, cols, row_pieces, col_pieces;

  FLASH_INLINE Pieces(const Params& p) {  // NOLINT(google-explicit-constructor)
    cols = std::min(p.cols, kElements);
    rows = std::max<int64_t>(kElements / cols, 1);
    row_pieces = (p.rows + rows - 1) / rows;
    col_pieces = (p.cols + cols - 1) / cols;
  }
};

// Calls row_piece(f, row, first, end) for all pieces of all rows.
template <class RowPiece>
inline void for_pieces(const Params& p, const RowPiece& row_piece) {
  if (p.rows == 0 || p.cols == 0) return;
  const Pieces pieces(p);
  const int threads =
      flash::cpu::threads_for(30. * static_cast<double>(p.rows) * static_cast<double>(p.cols));
  with_function(p.function, [&](const auto& f) {
    parallel_for(pieces.row_pieces * pieces.col_pieces, threads, [&](int64_t task, int) {
      const int64_t first = task % pieces.col_pieces * pieces.cols;
      const int64_t end = std::min(first + pieces.cols, p.cols);
      const int64_t row = task / pieces.col_pieces * pieces.rows;
      const int64_t rows_end = std::min(row + pieces.rows, p.rows);
      for (int64_t i = row; i < rows_end; ++i) row_piece(f, i, first, end);
    });
  });
}

inline void activation_fwd(const Params& p) {
  with_dtype(p.dtype, [&]<Dtype T>() {
    for_pieces(p, [&](const auto& f, int64_t row, int64_t first, int64_t end) {
      fwd_row<T>(p, f, row, first, end);
    });
  });
}

inline void activation_bwd(const Params& p) {
  with_dtype(p.dtype, [&]<Dtype T>() {
    for_pieces(p, [&](const auto& f, int64_t row, int64_t first, int64_t end) {
      bwd_row<T>(p, f, row, first, end);
    });
  });
}

}  // namespace flash::activations::cpu::FLASH_ATTN_ISA
