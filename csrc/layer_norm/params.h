// Checked arguments, as kernels take them.
#pragma once

#include "base/matrix.h"
#include "layer_norm/keep.h"

namespace flash::layer_norm {

// A matrix of its own dtype, or a vector as a matrix all of whose rows it is.
struct TypedMatrix : Matrix {
  Dtype dtype = Dtype::kFloat32;

  FLASH_INLINE bool given() const { return ptr != nullptr; }
  FLASH_INLINE char* row(int64_t i) const { return Matrix::row(i, dtype_bytes(dtype)); }
};

// What is not given has a null pointer.
struct NormParams {
  int64_t rows, cols, x0_rows, out_rows;
  const void* rowscale;  // [rows]
  Dtype rowscale_dtype;
  float rowscale_const;
  TypedMatrix colscale;
  const int32_t *x0_subset, *out_subset;  // [rows], from 1; 0: none
  TypedMatrix weight, bias, weight1, bias1;
  float epsilon;
  bool is_rms_norm, zero_centered_weight;
  KeepRule keep;
};

struct FwdParams : NormParams {
  TypedMatrix x0, x1, residual;
  TypedMatrix out, out1, x;
  Dtype x_dtype;       // to which x is rounded, given or not
  Matrix mask, mask1;  // bytes
  float *mean, *rstd;  // [rows]
};

struct BwdParams : NormParams {
  TypedMatrix x, dout, dout1, dx, x0;
  const float *mean, *rstd;  // [rows]; mean: null for RMS norm
  TypedMatrix dx0, dx1, dresidual, out;
  TypedMatrix dweight, dbias, dweight1, dbias1, dcolscale;
};

// Sums over rows that a backward may be asked for.
enum Gradient : int { kDWeight, kDBias, kDWeight1, kDBias1, kDColscale };
inline constexpr int kGradients = 5;

FLASH_INLINE const TypedMatrix& gradient(const BwdParams& p, int which) {
  switch (which) {
    case kDWeight:
      return p.dweight;
    case kDBias:
      return p.dbias;
    case kDWeight1:
      return p.dweight1;
    case kDBias1:
      return p.dbias1;
    default:
      return p.dcolscale;
  }
}

// Row of x0 or out that belongs to a row of x; -1: none.
FLASH_INLINE int64_t place_of(const int32_t* subset, int64_t row) {
  return subset == nullptr ? row : int64_t{subset[row]} - 1;
}

}  // namespace flash::layer_norm
