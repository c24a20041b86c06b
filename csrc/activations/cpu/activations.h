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
    return flash::cpu::FLASH_ATTN_ISA::exp(select(x > 88.f, set1(89.f), x));
  }
  FLASH_INLINE static Vec tanh(Vec x) { return flash::cpu::FLASH_ATTN_ISA::tanh(x); }
  FLASH_INLINE static Vec reciprocal(Vec x) { return 1.f / x; }
  FLASH_INLINE static Vec max_0(Vec x) { return select(x <= 0.f, zero(), x); }
  FLASH_INLINE static Vec step(Vec x) { return select(x <= 0.f, zero(), set1(1.f)); }
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

// `sums`, from column `first` on, takes dx in addition; nullptr: is not wanted.
template <Dtype T, class F>
FLASH_INLINE void bwd_row(const Params& p, const F& f, int64_t row, int64_t first, int64_t end,
                          float* sums = nullptr) {
  const RowIn<Dtype::kFloat32> sums_in{reinterpret_cast<char*>(sums), 0.f};
  const RowOut<Dtype::kFloat32> sums_out{reinterpret_cast<char*>(sums)};
  const auto x = row_in<T>(p.x, row, 0.f), bias = row_in<T>(p.bias, row, 0.f);
  const auto y = row_in<T>(p.y, row, 1.f), dout = row_in<T>(p.dout, row, 0.f);
  const auto dx = row_out<T>(p.dx, row), dy = row_out<T>(p.dy, row);
  for_vectors(first, end, [&](int64_t i, auto n) {
    const auto [value, slope] = f(VecMath{}, load_from(x, i, n) + load_from(bias, i, n));
    const Vec g = load_from(dout, i, n), gate = load_from(y, i, n);
    const Vec of_x = g * gate * slope;
    store_to(dx, i, n, of_x);
    store_to(dy, i, n, g * value);
    store_to(sums_out, i - first, n, load_from(sums_in, i - first, n) + of_x);
  });
}

// The pieces that tasks are: `rows` rows, `cols` columns of them.
struct Pieces {
  static constexpr int64_t kElements = 16384;
  int64_t rows, cols, row_pieces, col_pieces;

  FLASH_INLINE Pieces(const Params& p, int64_t most_cols, int64_t least_rows) {
    cols = std::clamp<int64_t>(p.cols, 1, most_cols);
    rows = std::max(kElements / cols, least_rows);
    row_pieces = (p.rows + rows - 1) / rows;
    col_pieces = (p.cols + cols - 1) / cols;
  }

  // Where rows are summed: few pieces, whose sums stay in the cache.
  FLASH_INLINE static Pieces of_sums(const Params& p) {
    constexpr int64_t kCols = 2048, kMostRowPieces = 32;
    return {p, kCols, (p.rows + kMostRowPieces - 1) / kMostRowPieces};
  }
};

// Calls row_piece(f, row, first, end) for all pieces of all rows, those of a piece in order.
template <class RowPiece>
inline void for_pieces(const Params& p, const Pieces& pieces, const RowPiece& row_piece) {
  if (p.rows == 0 || p.cols == 0) return;
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
    const Pieces pieces(p, Pieces::kElements, 1);
    for_pieces(p, pieces, [&](const auto& f, int64_t row, int64_t first, int64_t end) {
      fwd_row<T>(p, f, row, first, end);
    });
  });
}

// dbias from the sums of the pieces of rows, [row_pieces, cols].
inline void add_sums(const Params& p, const float* sums, const Pieces& pieces) {
  for_vectors(0, p.cols, [&](int64_t i, auto n) {
    Vec sum = zero();
    for (int64_t piece = 0; piece < pieces.row_pieces; ++piece)
      sum +=
          load_from(row_in<Dtype::kFloat32>({const_cast<float*>(sums), p.cols}, piece, 0.f), i, n);
    store_to(RowOut<Dtype::kFloat32>{reinterpret_cast<char*>(p.dbias)}, i, n, sum);
  });
}

template <Dtype T>
inline void bwd_with_dbias(const Params& p) {
  const Pieces pieces = Pieces::of_sums(p);
  const size_t bytes = pieces.row_pieces * p.cols * sizeof(float);
  const flash::cpu::Scratch scratch(bytes);
  float* sums = reinterpret_cast<float*>(scratch.data());
  if (bytes > 0) std::memset(sums, 0, bytes);
  for_pieces(p, pieces, [&](const auto& f, int64_t row, int64_t first, int64_t end) {
    bwd_row<T>(p, f, row, first, end, sums + row / pieces.rows * p.cols + first);
  });
  add_sums(p, sums, pieces);
}

inline void activation_bwd(const Params& p) {
  with_dtype(p.dtype, [&]<Dtype T>() {
    if (p.dbias != nullptr) return bwd_with_dbias<T>(p);
    const Pieces pieces(p, Pieces::kElements, 1);
    for_pieces(p, pieces, [&](const auto& f, int64_t row, int64_t first, int64_t end) {
      bwd_row<T>(p, f, row, first, end);
    });
  });
}

}  // namespace flash::activations::cpu::FLASH_ATTN_ISA
