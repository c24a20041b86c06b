// Cross entropy on the CPU. A row is one thread's: results do not depend on their number.
//
// Forward: a row is read once from memory, in blocks that stay in the first-level cache. The sum of
// exp(z - max) takes a new maximum along with it (Milakov and Gimelshein, arXiv:1805.02867). Sums
// of blocks are added up in their order. Backward: each logit is read once, and its gradient
// written once; nothing else is of a row's size.
#pragma once

#include <algorithm>

#include "base/cpu/parallel.h"
#include "base/cpu/row_access.h"
#include "base/cpu/scratch.h"
#include "xentropy/row_state.h"

namespace flash::xentropy::cpu::FLASH_ATTN_ISA {

using namespace flash::cpu::FLASH_ATTN_ISA;  // NOLINT(google-build-using-namespace)

// The first n lanes of x; `absent` in the others.
FLASH_INLINE Vec lanes(Vec x, Constant<kWidth>, float) { return x; }
FLASH_INLINE Vec lanes(Vec x, int n, float absent) { return select(iota() < n, x, set1(absent)); }

// Of some classes of a row.
struct Sums {
  float max;      // of z - anchor
  float sum;      // of exp(z - anchor), if that is at most 0
  float centred;  // of z - anchor
};

template <Dtype T>
FLASH_INLINE float largest_of(const RowIn<T>& x, float scale, int64_t first, int64_t end) {
  Vec largest = set1(-INFINITY);
  for_vectors(first, end, [&](int64_t i, auto n) {
    largest = max(largest, lanes(load_from(x, i, n) * scale, n, -INFINITY));
  });
  return reduce_max(largest);
}

template <Dtype T>
FLASH_INLINE Sums sums_of(const RowIn<T>& x, float scale, float anchor, int64_t first,
                          int64_t end) {
  Vec largest = set1(-INFINITY), sum = zero(), centred = zero();
  for_vectors(first, end, [&](int64_t i, auto n) {
    const Vec difference = load_from(x, i, n) * scale - anchor;
    largest = max(largest, lanes(difference, n, -INFINITY));
    centred += lanes(difference, n, 0.f);
    sum += lanes(flash::cpu::FLASH_ATTN_ISA::exp(difference), n, 0.f);
  });
  return {reduce_max(largest), reduce_add(sum), reduce_add(centred)};
}

// Adds the classes first..end, of which `before` were there already, to a row's state. Few blocks
// of a row have a larger maximum than those before them: only these are summed twice.
template <Dtype T>
FLASH_INLINE void add_block(RowState& s, const RowIn<T>& x, float scale, int64_t first, int64_t end,
                            int64_t before) {
  const auto raise = [&] {
    const float larger = largest_of(x, scale, first, end);
    if (larger > s.max) s.raise(larger, before);
  };
  if (s.max == -INFINITY) raise();
  Sums sums = sums_of(x, scale, s.anchor(), first, end);
  if (sums.max > 0.f) {
    raise();
    sums = sums_of(x, scale, s.anchor(), first, end);
  }
  s.sum += sums.sum;
  s.centred += sums.centred;
}

template <Dtype T>
FLASH_INLINE void add_row(RowState& s, const Params& p, int64_t row) {
  constexpr int64_t kBlock = 2048;
  const auto x = row_in<T>(p.logits, row, 0.f);
  for (int64_t first = 0; first < p.cols; first += kBlock)
    add_block(s, x, p.options.logit_scale, first, std::min(first + kBlock, p.cols),
              p.classes_before + first);
}

// The column of a row's label; none of the columns if it is not among them.
FLASH_INLINE int64_t label_column(const Params& p, int64_t row) {
  return p.labels[row] - p.options.class_start;
}
FLASH_INLINE bool is_column(const Params& p, int64_t column) {
  return column >= 0 && column < p.cols;
}

template <Dtype T>
FLASH_INLINE RowState state_of_row(const Params& p, int64_t row) {
  RowState s;
  if (p.classes_before > 0) s = reinterpret_cast<const RowState*>(p.state)[row];
  if (p.precomputed_lse != nullptr) {
    s = {p.precomputed_lse[row], 1.f, 0.f, 0.f};
  } else {
    add_row<T>(s, p, row);
  }
  const int64_t column = label_column(p, row);
  if (is_column(p, column))
    s.label = load_tail<T>(p.logits.row(row, dtype_bytes(T)), column, 1)[0] * p.options.logit_scale;
  return s;
}

template <Dtype T>
FLASH_INLINE void fwd_row(const Params& p, int64_t row) {
  const bool ignored = p.labels[row] == p.options.ignore_index;
  const RowState s = ignored ? ignored_row() : state_of_row<T>(p, row);
  reinterpret_cast<RowState*>(p.state)[row] = s;
  if (p.losses == nullptr) return;
  const Losses losses = ignored ? Losses{} : losses_of(s, p.options);
  p.losses[row] = losses.loss;
  p.z_losses[row] = losses.z_loss;
}

template <Dtype T>
FLASH_INLINE void bwd_row(const Params& p, int64_t row) {
  if (p.labels[row] == p.options.ignore_index)
    return zero_row(T, p.dlogits.row(row, dtype_bytes(T)), p.cols);
  const RowState s = reinterpret_cast<const RowState*>(p.state)[row];
  const Gradient g = gradient_of(s, p.options, p.dlosses[row]);
  const auto x = row_in<T>(p.logits, row, 0.f);
  const auto dx = row_out<T>(p.dlogits, row);
  const auto gradient = [&](Vec z) {
    return fma(flash::cpu::FLASH_ATTN_ISA::exp(z - g.anchor), set1(g.slope), set1(g.base));
  };
  for_vectors(0, p.cols, [&](int64_t i, auto n) {
    store_to(dx, i, n, gradient(load_from(x, i, n) * p.options.logit_scale));
  });
  const int64_t column = label_column(p, row);
  if (is_column(p, column)) dx.tail(column, 1, gradient(set1(s.label)) + g.at_label);
}

// Calls row_of(row) for all rows; a task has enough of them to be worth handing out.
template <class RowOf>
inline void for_rows(const Params& p, const RowOf& row_of) {
  constexpr int64_t kElements = 16384;
  const int64_t rows = std::max<int64_t>(kElements / std::max<int64_t>(p.cols, 1), 1);
  const int threads =
      flash::cpu::threads_for(30. * static_cast<double>(p.rows) * static_cast<double>(p.cols));
  parallel_for((p.rows + rows - 1) / rows, threads, [&](int64_t task, int) {
    const int64_t end = std::min((task + 1) * rows, p.rows);
    for (int64_t row = task * rows; row < end; ++row) row_of(row);
  });
}

inline void xentropy_fwd(const Params& p) {
  with_dtype(p.dtype, [&]<Dtype T>() { for_rows(p, [&](int64_t row) { fwd_row<T>(p, row); }); });
}

inline void xentropy_bwd(const Params& p) {
  with_dtype(p.dtype, [&]<Dtype T>() { for_rows(p, [&](int64_t row) { bwd_row<T>(p, row); }); });
}

}  // namespace flash::xentropy::cpu::FLASH_ATTN_ISA
