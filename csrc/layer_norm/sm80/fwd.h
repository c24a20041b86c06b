// The forward: a row is read once, stays in registers, and is written once. Rows of more than one
// tile are read again for their variance and for the output: of x where it is written, else of what
// it is the sum of.
#pragma once

#include "layer_norm/sm80/row.h"

namespace flash::layer_norm::sm80 {

// A row of x, and where it comes from and goes to.
struct FwdRow {
  int64_t row, x0_row, out_row;
  float scale;  // of x0
};

FLASH_DEVICE FwdRow fwd_row(const FwdParams& p, const Launch& launch, int64_t row, bool exists) {
  if (!exists) return {row, -1, -1, 0.f};
  return {row, checked_place(p.x0_subset, row, p.x0_rows, launch.faults, IndexTensor::kX0Subset),
          checked_place(p.out_subset, row, p.out_rows, launch.faults, IndexTensor::kOutSubset),
          scale_of(p, row)};
}

FLASH_DEVICE void add(Values& x, const Values& y) {
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) x[k] += y[k];
}

template <Dtype kDtype>
FLASH_DEVICE float rounded(float x) {
  return ptx::to_float<kDtype>(ptx::from_float<kDtype>(x));
}

FLASH_DEVICE void round_to(Values& x, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return;
  const bool is_bf16 = dtype == Dtype::kBFloat16;
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k)
    x[k] = is_bf16 ? rounded<Dtype::kBFloat16>(x[k]) : rounded<Dtype::kFloat16>(x[k]);
}

// x = dropout(x0) rowscale colscale + dropout(x1) + residual
FLASH_DEVICE void sum_branches(Values& x, const FwdParams& p, const FwdRow& row,
                               const Columns& at) {
  Values y;
  fill(x, 0.f);
  if (row.x0_row >= 0) {
    load(x, p.x0, row.x0_row, at);
    load(y, p.colscale, 0, at, 1.f);
#pragma unroll
    for (int k = 0; k < kColumnsOfThread; ++k) x[k] = x[k] * row.scale * y[k];
    if (p.keep.enabled) drop(x, p.keep, Branch::kX0, row.x0_row, at, p.mask);
  }
  if (p.x1.given()) {
    load(y, p.x1, row.row, at);
    if (p.keep.enabled) drop(y, p.keep, Branch::kX1, row.row, at, p.mask1);
    add(x, y);
  }
  if (p.residual.given()) {
    load(y, p.residual, row.row, at);
    add(x, y);
  }
  round_to(x, p.x_dtype);
}

FLASH_DEVICE void read_tile(Values& x, const FwdParams& p, const FwdRow& row, const Columns& at,
                            int pass) {
  if (pass > 0 && p.x.given()) return load(x, p.x, row.row, at);
  sum_branches(x, p, row, at);
}

FLASH_DEVICE void write_norm(const FwdParams& p, const TypedMatrix& out, const TypedMatrix& weight,
                             const TypedMatrix& bias, int64_t row, const Values& norm,
                             const Columns& at) {
  if (!out.given()) return;
  Values w, b;
  load_weight(w, p, weight, at);
  load(b, bias, 0, at);
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) w[k] = fmaf(norm[k], w[k], b[k]);
  store(out, row, w, at);
}

struct Statistics {
  float mean = 0.f, rest = 0.f, rstd = 0.f;  // rest: what rounding left in the mean
};

enum Pass { kSum, kMoments, kOutput, kPasses };

// What a tile adds to the sums of a pass.
FLASH_DEVICE void add_sums(float (&sums)[2], const Values& x, float mean, const Columns& at) {
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) {
    const float d = at.has(k) ? x[k] - mean : 0.f;
    sums[0] += d;
    sums[1] = fmaf(d, d, sums[1]);
  }
}

FLASH_DEVICE void finish_pass(Statistics& of, const FwdParams& p, float (&sums)[2], int pass,
                              int lanes) {
  const float n = static_cast<float>(p.cols);
  sum_lanes(sums, lanes);
  if (p.is_rms_norm) {
    of.rstd = 1.f / sqrtf(sums[1] / n + p.epsilon);
  } else if (pass == kSum) {
    of.mean = sums[0] / n;
  } else {
    of.rest = sums[0] / n;
    of.rstd = 1.f / sqrtf(fmaxf(sums[1] / n - of.rest * of.rest, 0.f) + p.epsilon);
  }
}

FLASH_DEVICE void write_statistics(const FwdParams& p, int64_t row, const Statistics& of) {
  if (p.mean != nullptr) p.mean[row] = of.mean + of.rest;
  if (p.rstd != nullptr) p.rstd[row] = of.rstd;
}

FLASH_DEVICE void write_outputs(const FwdParams& p, const FwdRow& row, Values& x,
                                const Statistics& of, const Columns& at) {
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) x[k] = (x[k] - of.mean - of.rest) * of.rstd;
  if (row.out_row < 0) return;
  write_norm(p, p.out, p.weight, p.bias, row.out_row, x, at);
  write_norm(p, p.out1, p.weight1, p.bias1, row.out_row, x, at);
}

template <NormConfig C>
FLASH_DEVICE void layer_norm_fwd(const FwdParams& p, const Launch& launch) {
  const int lanes = launch.lanes, rows_of_cta = C.threads() / lanes;
  const int64_t index =
      static_cast<int64_t>(ptx::read_ctaid_x()) * rows_of_cta + threadIdx.x / lanes;
  const bool exists = index < p.rows;
  const FwdRow row = fwd_row(p, launch, index, exists);
  Columns at{0, static_cast<int>(threadIdx.x) & (lanes - 1), lanes,
             exists ? static_cast<int>(p.cols) : 0, launch.by_chunks};
  Statistics of;
  Values x;
#pragma unroll 1
  for (int pass = kSum; pass < kPasses; ++pass) {
    if (p.is_rms_norm && pass == kMoments) continue;
    float sums[2] = {};
#pragma unroll 1
    for (int tile = 0; tile < launch.tiles; ++tile) {
      at.first = tile * lanes * kColumnsOfThread;
      if (pass == kSum || launch.tiles > 1) read_tile(x, p, row, at, pass);
      if (pass == kSum) store(p.x, index, x, at);
      if (pass == kOutput) {
        write_outputs(p, row, x, of, at);
      } else {
        add_sums(sums, x, of.mean, at);
      }
    }
    if (pass != kOutput) finish_pass(of, p, sums, pass, lanes);
  }
  if (exists && at.lane == 0) write_statistics(p, index, of);
}

}  // namespace flash::layer_norm::sm80
