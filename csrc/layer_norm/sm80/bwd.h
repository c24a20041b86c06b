// The backward. With xhat = norm(x) and g = dout weight + dout1 weight1,
//
//   dx = rstd (g - mean(g) - xhat mean(g xhat)) + what flows into x beside its norm
//
// without mean(g) for RMS norm. A row is read once, stays in registers, and is written once; rows
// of more than one tile are read twice. A CTA goes through rows at a fixed distance, adds up what
// they give to the gradients of weight and bias, in registers if a row is one tile, and leaves it
// to layer_norm_sums: the number of CTAs and the order of all sums depend on the shape alone.
#pragma once

#include "layer_norm/sm80/row.h"

namespace flash::layer_norm::sm80 {

struct BwdRow {
  int64_t row, x0_row, out_row;
  float scale, mean, rstd;
};

FLASH_DEVICE BwdRow bwd_row(const BwdParams& p, const Launch& launch, int64_t row, bool exists) {
  if (!exists) return {row, -1, -1, 0.f, 0.f, 0.f};
  return {row,
          checked_place(p.x0_subset, row, p.x0_rows, launch.faults, IndexTensor::kX0Subset),
          checked_place(p.out_subset, row, p.out_rows, launch.faults, IndexTensor::kOutSubset),
          scale_of(p, row),
          p.mean == nullptr ? 0.f : p.mean[row],
          p.rstd[row]};
}

// Adds to this thread's columns of sums in memory, or begins them: for rows that do not exist too.
FLASH_DEVICE void add_to_partial(float* partial, const Values& x, Columns at, int cols,
                                 bool begins) {
  if (partial == nullptr) return;
  at.cols = cols;
  Values sum;
  fill(sum, 0.f);
  if (!begins) load_row<Dtype::kFloat32>(sum, reinterpret_cast<const char*>(partial), at);
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) sum[k] += x[k];
  store_row<Dtype::kFloat32>(reinterpret_cast<char*>(partial), sum, at);
}

// This thread's rows of partials; null: not wanted, or in registers.
struct PartialRows {
  float* of[kGradients];
};

// dout of an output; adds dout weight to g.
FLASH_DEVICE void load_output(Values& dout, Values& g, const BwdParams& p, const TypedMatrix& from,
                              const TypedMatrix& weight, const BwdRow& row, const Columns& at) {
  fill(dout, 0.f);
  if (row.out_row >= 0) load(dout, from, row.out_row, at);
  Values w;
  load_weight(w, p, weight, at);
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) g[k] = fmaf(dout[k], w[k], g[k]);
}

// What dout gives to the gradients of weight and bias, where these are in memory.
FLASH_DEVICE void add_output(float* dweight, float* dbias, const Values& dout, const Values& xhat,
                             const Columns& at, int cols, bool begins) {
  add_to_partial(dbias, dout, at, cols, begins);
  if (dweight == nullptr) return;
  Values product;
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) product[k] = dout[k] * xhat[k];
  add_to_partial(dweight, product, at, cols, begins);
}

// What the columns of a thread give to the gradients of weight and bias, of all rows of a CTA.
struct WeightSums {
  Values dweight, dbias;
};

// xhat and g of a tile. `sums`: whether its part of the gradients of weight and bias is added.
FLASH_DEVICE void load_tile(Values& xhat, Values& g, WeightSums& in_registers, const BwdParams& p,
                            const BwdRow& row, const Columns& at, const PartialRows& partials,
                            bool sums, bool begins) {
  const int cols = static_cast<int>(p.cols);
  load(xhat, p.x, row.row, at);
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k)
    xhat[k] = at.has(k) ? (xhat[k] - row.mean) * row.rstd : 0.f;
  Values dout;
  fill(g, 0.f);
  load_output(dout, g, p, p.dout, p.weight, row, at);
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) {
    in_registers.dweight[k] = fmaf(dout[k], xhat[k], in_registers.dweight[k]);
    in_registers.dbias[k] += dout[k];
  }
  if (sums) add_output(partials.of[kDWeight], partials.of[kDBias], dout, xhat, at, cols, begins);
  if (!p.dout1.given()) return;
  load_output(dout, g, p, p.dout1, p.weight1, row, at);
  if (sums) add_output(partials.of[kDWeight1], partials.of[kDBias1], dout, xhat, at, cols, begins);
}

FLASH_DEVICE void write_output(const BwdParams& p, const BwdRow& row, const Values& xhat,
                               const Columns& at) {
  if (!p.out.given() || row.out_row < 0) return;
  Values w, b;
  load_weight(w, p, p.weight, at);
  load(b, p.bias, 0, at);
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) w[k] = fmaf(xhat[k], w[k], b[k]);
  store(p.out, row.out_row, w, at);
}

// dx of a tile -> gradients of what x is the sum of
FLASH_DEVICE void write_branches(const BwdParams& p, const BwdRow& row, const Values& dx,
                                 const Columns& at, float* dcolscale, bool begins) {
  store(p.dresidual, row.row, dx, at);
  Values y, factor;
  if (p.dx1.given()) {
#pragma unroll
    for (int k = 0; k < kColumnsOfThread; ++k) y[k] = dx[k];
    if (p.keep.enabled) drop(y, p.keep, Branch::kX1, row.row, at, {});
    store(p.dx1, row.row, y, at);
  }
  fill(factor, row.x0_row >= 0 ? row.scale : 0.f);
  if (p.keep.enabled) drop(factor, p.keep, Branch::kX0, row.x0_row, at, {});
  if (dcolscale != nullptr) {
    fill(y, 0.f);
    if (row.x0_row >= 0) load(y, p.x0, row.x0_row, at);
#pragma unroll
    for (int k = 0; k < kColumnsOfThread; ++k)
      y[k] = factor[k] != 0.f ? dx[k] * factor[k] * y[k] : 0.f;
    add_to_partial(dcolscale, y, at, static_cast<int>(p.cols), begins);
  }
  if (!p.dx0.given() || row.x0_row < 0) return;
  load(y, p.colscale, 0, at, 1.f);
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k)
    y[k] = factor[k] != 0.f ? dx[k] * factor[k] * y[k] : 0.f;
  store(p.dx0, row.x0_row, y, at);
}

// The sums of the rows of a CTA for this thread's columns, added in the rows' order, to the CTA's
// row of partials.
FLASH_DEVICE void write_partial(float* partial, const Values& sums, const Columns& at) {
  __shared__ float of_rows[NormConfig::threads() * kColumnsOfThread];
  const int width = at.lanes * kColumnsOfThread, rows = NormConfig::threads() / at.lanes;
  float* own = of_rows + threadIdx.x / at.lanes * width;
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) own[k * at.lanes + at.lane] = sums[k];
  __syncthreads();
  if (threadIdx.x < at.lanes) {
    Values total;
#pragma unroll
    for (int k = 0; k < kColumnsOfThread; ++k) {
      total[k] = 0.f;
      for (int row = 0; row < rows; ++row)
        total[k] += of_rows[row * width + k * at.lanes + at.lane];
    }
    store_row<Dtype::kFloat32>(reinterpret_cast<char*>(partial), total, at);
  }
  __syncthreads();
}

// Of dweight and dbias, that are in registers where a row is one tile, a CTA leaves a row; of the
// others each of its rows does.
FLASH_DEVICE PartialRows partial_rows(const Partials& partials, const Launch& launch, int cta,
                                      int row_of_cta, int rows_of_cta) {
  PartialRows rows;
#pragma unroll
  for (int i = 0; i < kGradients; ++i) {
    const bool in_registers = i <= kDBias && launch.tiles == 1;
    rows.of[i] = partials.of[i] == nullptr || in_registers
                     ? nullptr
                     : partials.of[i] + (int64_t{cta} * rows_of_cta + row_of_cta) * partials.stride;
  }
  return rows;
}

// What one pass over a row learns for the next.
struct Means {
  float g, gx;
};

FLASH_DEVICE void add_sums(float (&sums)[2], const Values& g, const Values& xhat) {
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) {
    sums[0] += g[k];
    sums[1] = fmaf(g[k], xhat[k], sums[1]);
  }
}

// g of a tile -> dx
FLASH_DEVICE void through_norm(Values& g, const Values& xhat, const BwdParams& p, const BwdRow& row,
                               const Means& mean, const Columns& at) {
  Values dx;
  load(dx, p.dx, row.row, at);
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k)
    g[k] = row.out_row < 0 ? dx[k] : (g[k] - mean.g - xhat[k] * mean.gx) * row.rstd + dx[k];
}

// A row, in two passes over its tiles.
FLASH_DEVICE void bwd_tiles(const BwdParams& p, const Launch& launch, const BwdRow& row, Columns at,
                            const PartialRows& partials, WeightSums& weights, bool begins) {
  Values xhat, g;
  float sums[2] = {};
  Means mean;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
    for (int tile = 0; tile < launch.tiles; ++tile) {
      at.first = tile * at.lanes * kColumnsOfThread;
      if (pass == 0 || launch.tiles > 1)
        load_tile(xhat, g, weights, p, row, at, partials, pass == 0, begins);
      if (pass == 0) {
        add_sums(sums, g, xhat);
      } else {
        write_output(p, row, xhat, at);
        through_norm(g, xhat, p, row, mean, at);
        write_branches(p, row, g, at, partials.of[kDColscale], begins);
      }
    }
    if (pass != 0) break;
    sum_lanes(sums, at.lanes);
    const float n = static_cast<float>(p.cols);
    mean = {p.is_rms_norm ? 0.f : sums[0] / n, sums[1] / n};
  }
}

template <NormConfig C>
FLASH_DEVICE void layer_norm_bwd(const BwdParams& p, const Launch& launch, const Partials& partials,
                                 int ctas) {
  const int lanes = launch.lanes, rows_of_cta = C.threads() / lanes;
  const int cta = ptx::read_ctaid_x(), row_of_cta = threadIdx.x / lanes;
  const int n = static_cast<int>(p.cols);
  const PartialRows rows = partial_rows(partials, launch, cta, row_of_cta, rows_of_cta);
  Columns at{0, static_cast<int>(threadIdx.x) & (lanes - 1), lanes, n, launch.by_chunks};
  WeightSums weights;
  fill(weights.dweight, 0.f);
  fill(weights.dbias, 0.f);
  const int64_t begin = int64_t{cta} * rows_of_cta;
#pragma unroll 1
  for (int64_t first = begin; first < p.rows; first += int64_t{ctas} * rows_of_cta) {
    const bool exists = first + row_of_cta < p.rows;
    at.cols = exists ? n : 0;
    bwd_tiles(p, launch, bwd_row(p, launch, first + row_of_cta, exists), at, rows, weights,
              first == begin);
  }
  if (launch.tiles > 1) return;
  at.cols = n;
  if (partials.of[kDWeight] != nullptr)
    write_partial(partials.of[kDWeight] + cta * partials.stride, weights.dweight, at);
  if (partials.of[kDBias] != nullptr)
    write_partial(partials.of[kDBias] + cta * partials.stride, weights.dbias, at);
}

// Adds up partials: a CTA has 32 columns of one gradient, its warps have parts in turn.
template <NormConfig C>
FLASH_DEVICE void layer_norm_sums(const SumsLaunch& launch) {
  constexpr int kColumns = 32, kWarps = C.threads() / kColumns;
  const int blocks = (launch.cols + kColumns - 1) / kColumns;
  const int which = ptx::read_ctaid_x() / blocks;
  const int column = ptx::read_ctaid_x() % blocks * kColumns + threadIdx.x % kColumns;
  const int warp = threadIdx.x / kColumns;
  const TypedMatrix& to = launch.to[which];
  if (!to.given()) return;
  float sum = 0.f;
  if (column < launch.cols)
    for (int part = warp; part < launch.parts[which]; part += kWarps)
      sum += launch.partials.of[which][part * launch.partials.stride + column];
  __shared__ float of_warps[kWarps][kColumns];
  of_warps[warp][threadIdx.x % kColumns] = sum;
  __syncthreads();
  if (warp != 0 || column >= launch.cols) return;
  float total[1] = {};
  for (int w = 0; w < kWarps; ++w) total[0] += of_warps[w][threadIdx.x];
  with_dtype(to.dtype, [&]<Dtype kDtype>() {
    ptx::store_elements<kDtype>(to.row(0) + column * dtype_bytes(kDtype), total);
  });
}

}  // namespace flash::layer_norm::sm80
