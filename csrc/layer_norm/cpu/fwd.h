// The forward: a row is read once, stays in the first-level cache as fp32, and is written once.
#pragma once

#include "layer_norm/cpu/fwd_plain.h"

namespace flash::layer_norm::cpu::FLASH_ATTN_ISA {

struct FwdScratch {
  float *x, *keep, *keep1;  // a row each

  FwdScratch(Carver& carver, const FwdParams& p)
      : x(carver.take<float>(padded(p.cols))),
        keep(carver.take<float>(p.keep.enabled ? padded(p.cols) : 0)),
        keep1(carver.take<float>(p.keep.enabled && p.x1.given() ? padded(p.cols) : 0)) {}
};

// x = dropout(x0) rowscale colscale + dropout(x1) + residual
inline void sum_branches(const FwdParams& p, const Columns& columns, const FwdScratch& scratch,
                         int64_t row) {
  const int64_t x0_row = place_of(p.x0_subset, row);
  if (x0_row >= 0) {
    if (p.keep.enabled) {
      keep_factors(scratch.keep, p.keep, Branch::kX0, x0_row, p.cols);
      write_mask(p.mask, x0_row, scratch.keep, p.cols);
    }
    const float* keep = p.keep.enabled ? scratch.keep : nullptr;
    add_row<true>(scratch.x, p.x0, x0_row, {scale_of(p, row), columns.colscale, keep}, p.cols);
  } else {
    std::memset(scratch.x, 0, padded(p.cols) * sizeof(float));
  }
  if (p.x1.given()) {
    if (p.keep.enabled) {
      keep_factors(scratch.keep1, p.keep, Branch::kX1, row, p.cols);
      write_mask(p.mask1, row, scratch.keep1, p.cols);
    }
    const float* keep = p.keep.enabled ? scratch.keep1 : nullptr;
    add_row<false>(scratch.x, p.x1, row, {.keep = keep}, p.cols);
  }
  if (p.residual.given()) add_row<false>(scratch.x, p.residual, row, {}, p.cols);
}

// out = norm(x) weight + bias
FLASH_INLINE void write_norm(const TypedMatrix& out, int64_t row, const float* x,
                             const Statistics& at, const float* weight, const float* bias,
                             int64_t cols, const NextRow& x0, const NextRow& residual) {
  if (!out.given()) return;
  with_dtype(out.dtype, [&]<Dtype T>() {
    char* const to = out.row(row);
    for_vectors(0, cols, [&](int64_t i, auto n) {
      const Vec norm = (load(x + i) - at.mean - at.rest) * at.rstd;
      store_given<T>(to, i, n, fma(norm, load(weight + i), load(bias + i)));
      x0.fetch(i);
      residual.fetch(i);
    });
  });
}

// Whether x is x0 as it is, and thus of its dtype already.
FLASH_INLINE bool is_x0(const FwdParams& p) {
  return !p.x1.given() && !p.residual.given() && !p.x.given() && !p.keep.enabled &&
         !p.colscale.given() && p.rowscale == nullptr && p.rowscale_const == 1.f;
}

// x, written where it is wanted, as its dtype has it.
FLASH_INLINE void round_sum(const FwdParams& p, float* x, int64_t row) {
  if (is_x0(p)) return;
  with_dtype(p.x_dtype, [&]<Dtype T>() {
    if (T == Dtype::kFloat32 && !p.x.given()) return;
    char* const out = p.x.given() ? p.x.row(row) : nullptr;
    for_vectors(0, p.cols, [&](int64_t i, auto n) {
      alignas(64) char own[kWidth * sizeof(float)];
      const Vec v = load(x + i);
      if (out == nullptr) {
        store_from_float<T>(own, 0, v);
        store(x + i, load_as_float<T>(own, 0));
      } else {
        store_given<T>(out, i, n, v);
        store(x + i, load_given(RowIn<T>{out, 0.f}, i, n));
      }
    });
  });
}

// The row that is normed, in the cache, and its statistics.
FLASH_INLINE Statistics sum_row_of(const FwdParams& p, const Columns& columns,
                                   const FwdScratch& scratch, int64_t row) {
  if (is_plain(p)) {
    Statistics at;
    with_dtype(p.x0.dtype, [&]<Dtype T>() { at = sum_plain_row<T>(p, scratch.x, row); });
    return at;
  }
  sum_branches(p, columns, scratch, row);
  round_sum(p, scratch.x, row);
  return statistics_of(scratch.x, p.epsilon, p.cols, p.is_rms_norm);
}

inline void fwd_row(const FwdParams& p, const Columns& columns, const FwdScratch& scratch,
                    int64_t row) {
  const Statistics at = sum_row_of(p, columns, scratch, row);
  const float* x = scratch.x;
  if (p.mean != nullptr) p.mean[row] = at.mean + at.rest;
  if (p.rstd != nullptr) p.rstd[row] = at.rstd;
  const int64_t out_row = place_of(p.out_subset, row);
  if (out_row < 0) return;
  const bool in_order = p.x0_subset == nullptr;
  const NextRow x0(p.x0, row + 1, in_order ? p.rows : 0), residual(p.residual, row + 1, p.rows);
  write_norm(p.out, out_row, x, at, columns.weight, columns.bias, p.cols, x0, residual);
  write_norm(p.out1, out_row, x, at, columns.weight1, columns.bias1, p.cols, x0, residual);
}

inline void layer_norm_fwd(const FwdParams& p) {
  if (p.rows == 0 || p.cols == 0) return;
  const int64_t task_rows = rows_of_task(p.cols);
  const int64_t tasks = (p.rows + task_rows - 1) / task_rows;
  const int threads = threads_for_rows(p);
  Carver measure(nullptr);
  const FwdScratch measured(measure, p);
  const size_t shared = columns_bytes(p.cols), own = measure.used();
  const Scratch memory(shared + own * threads);
  Carver carver(memory.data());
  const Columns columns = take_columns(carver, p);
  parallel_for(tasks, threads, [&](int64_t task, int thread) {
    Carver own_carver(memory.data() + shared + own * thread);
    const FwdScratch scratch(own_carver, p);
    const int64_t end = std::min((task + 1) * task_rows, p.rows);
    for (int64_t row = task * task_rows; row < end; ++row) fwd_row(p, columns, scratch, row);
  });
}

}  // namespace flash::layer_norm::cpu::FLASH_ATTN_ISA
