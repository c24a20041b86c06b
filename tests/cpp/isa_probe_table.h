// The table of function pointers alone: included by units with instruction set flags, which must
// not see the inline functions of the standard library or of GoogleTest.
#pragma once

#include <cstdint>

#include "common/flash.h"
#include "cpu/cpu_backend.h"

namespace flash_test {

enum class Start { kZero, kKeep, kScaleRows };  // of C

struct MatrixProduct {
  bool transposed_a, skip_zeros;
  int rows, columns, k;
  const float* a;
  int64_t a_ld;
  const float* b;
  int64_t b_panel_stride, b_row_stride;
  float* c;
  int64_t c_ld;
  Start start;
  const float* row_scale;
};

// Lengths n are multiples of width unless told otherwise.
struct IsaProbe {
  const char* name;
  int width, tile_m, tile_n;
  void (*exp2)(float* y, const float* x, int n);
  void (*exp)(float* y, const float* x, int n);
  void (*tanh)(float* y, const float* x, int n);
  void (*tanh_of_half)(float* y, const float* x, int n);  // n values, n slopes
  void (*partners)(float* y, const float* x, int step);   // one vector
  float (*reduce_add)(const float* x);
  float (*reduce_max)(const float* x);
  void (*load)(flash::Dtype t, float* y, const void* x, int n);
  void (*store)(flash::Dtype t, void* y, const float* x, int n);
  float (*load_scalar)(const void* x, flash::Dtype t, int64_t i);
  void (*load_tail)(flash::Dtype t, float* y, const void* x, int64_t i, int n);  // any n < width
  void (*store_tail)(flash::Dtype t, void* y, int64_t i, int n, const float* x);
  bool (*read_row)(flash::Dtype t, float* y, const void* x, int d, int padded, float scale);
  void (*write_row)(flash::Dtype t, void* y, const float* x, int d, float scale);
  void (*multiply)(const MatrixProduct& product);
  // Rows of d fp32 elements, d apart.
  bool (*pack_transposed)(float* y, const float* x, int n, int d, float* buffer);
  bool (*pack_natural)(float* y, const float* x, int n, int n_padded, int d, float* buffer);
};

struct TileMatrices {
  int m, n, k;
  const float *a, *b;
  float* c;
  bool add;          // C += A B instead of C = A B
  uint32_t* memory;  // (m + n) * k * 3 / 2 words, 64-byte aligned, then 512 KiB
};

// Packed bf16 operands and their products (pack_bf16.h, tile_product.h). m is a multiple of 16, n
// and k are multiples of 32; terms 1, 2 or 3.
struct TileProbe {
  const char* name;
  void (*exp2_bf16)(float* y, const float* x, int n);
  void (*normal_exp2_bf16)(float* y, const float* x, int n);
  void (*tanh_by_table)(float* y, const float* x, int n);
  void (*split)(int terms, float* y, const float* x, int n);  // y[t * n + i] = term t of x[i]
  // A [m][k] and the transpose of B, [n][k], row-major.
  void (*multiply_columns)(int terms, const TileMatrices& x);
  // The transpose of A, [k][m], and B [k][n] row-major; m a multiple of 32.
  void (*multiply_rows)(int terms, const TileMatrices& x);
};

extern const IsaProbe probe_baseline, probe_avx2, probe_avx512, probe_wide16;
extern const TileProbe tile_probe_soft_dot, tile_probe_soft_tiles, tile_probe_avx512bf16,
    tile_probe_amx;

}  // namespace flash_test
