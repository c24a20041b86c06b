// Products of fp32 operands: C += A B in FMAs, in blocks of kTileM rows by kTileN columns held in
// registers, and the packing of their operands. Those of fwd.h and bwd.h; fwd_tiles.h and
// bwd_tiles.h take tile_product.h's, of bf16 pairs.
//
//   A  row-major [m][k], or its transpose [k][m]: elements are broadcast
//   B  panels of kTileN columns, element (k, n) at
//      (n / kTileN) * panel_stride + k * row_stride + n % kTileN
//   C  row-major [m][n]
#pragma once

#include "base/cpu/rows.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr int kTileM =
    kWidth == 16 ? 14 : 6;  // rows x 2 vectors of accumulators: 28 of 32, 12 of 16 registers
inline constexpr int kTileMTransposed = kWidth == 16 ? 12 : 6;  // where A is transposed
inline constexpr int kTileVectors = 2;
inline constexpr int kTileN = kTileVectors * kWidth;

constexpr int round_up(int x, int m) { return (x + m - 1) / m * m; }

// What the product is added to: 0, C, row_scale[m] * C, or C once the product's own sum is
// complete.
enum class Init { kZero, kKeep, kScaleRows, kAddSum };

struct OperandB {
  const float* data;
  int64_t panel_stride, row_stride;
};

struct Product {
  int k;           // length of the sum
  const float* a;  // element (m, k) at m * a_ld + k, or transposed k * a_ld + m
  int64_t a_ld;
  const float* b;  // one panel
  int64_t b_ld;
  float* c;
  int64_t c_ld;
  Init init;
  const float* row_scale;
};

template <int M, bool kTransA>
inline void multiply_tile(const Product& x) {
  Vec acc[M][kTileVectors];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) {
      const bool from_zero = x.init == Init::kZero || x.init == Init::kAddSum;
      acc[m][j] = from_zero ? zero() : load(x.c + m * x.c_ld + j * kWidth);
      if (x.init == Init::kScaleRows) acc[m][j] *= x.row_scale[m];
    }
  }
  // Of every four rows a pointer, lest offsets of all rows fill the general registers: the compiler
  // must not know that they are related.
  constexpr int kPointers = kTransA ? 1 : (M + 3) / 4;
  const float* a[kPointers];
#pragma GCC unroll 4
  for (int i = 0; i < kPointers; ++i) {
    a[i] = x.a + 4 * i * x.a_ld;
    asm("" : "+r"(a[i]));
  }
  const float* b = x.b;
  const int64_t a_ld = x.a_ld, b_ld = x.b_ld;
#pragma GCC unroll 4  // 97 % of the FMA peak instead of 75 % (Zen 3)
  for (int k = 0; k < x.k; ++k) {
    const Vec b0 = load(b), b1 = load(b + kWidth);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec av = set1(kTransA ? a[0][m] : a[m / 4][m % 4 * a_ld]);
      acc[m][0] = fma(av, b0, acc[m][0]);
      acc[m][1] = fma(av, b1, acc[m][1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; ++i) a[i] += kTransA ? a_ld : 1;
    b += b_ld;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) {
      float* c = x.c + m * x.c_ld + j * kWidth;
      store(c, x.init == Init::kAddSum ? acc[m][j] + load(c) : acc[m][j]);
    }
  }
}

template <bool kTransA, int M>
inline void multiply_tile_rows(int rows, const Product& x) {
  if (rows == M) return multiply_tile<M, kTransA>(x);
  if constexpr (M > 1) multiply_tile_rows<kTransA, M - 1>(rows, x);
}

// The same product where zeros in A hide rows of B that hold inf or NaN: skips them instead of
// multiplying.
template <bool kTransA>
inline void multiply_tile_skipping_zeros(int rows, const Product& x) {
  for (int m = 0; m < rows; ++m) {
    float* c = x.c + m * x.c_ld;
    for (int j = 0; j < kTileN; j += kWidth) {
      Vec acc = x.init == Init::kZero ? zero() : load(c + j);
      if (x.init == Init::kScaleRows) acc *= x.row_scale[m];
      for (int k = 0; k < x.k; ++k) {
        const float a = kTransA ? x.a[k * x.a_ld + m] : x.a[m * x.a_ld + k];
        if (a != 0.f) acc = fma(set1(a), load(x.b + k * x.b_ld + j), acc);
      }
      store(c + j, acc);
    }
  }
}

// C[rows][columns], columns rounded up to kTileN. Panels of B in the outer loop: one panel stays in
// L1 for all rows.
template <bool kTransA>
inline void multiply(int rows, int columns, const Product& product, const OperandB& b,
                     bool skip_zeros) {
  constexpr int kRows = kTransA ? kTileMTransposed : kTileM;
  for (int n = 0; n < columns; n += kTileN) {
    Product x = product;
    x.b = b.data + n / kTileN * b.panel_stride;
    x.b_ld = b.row_stride;
    x.c += n;
    for (int m = 0; m < rows; m += kRows) {
      const int count = rows - m < kRows ? rows - m : kRows;
      if (skip_zeros)
        multiply_tile_skipping_zeros<kTransA>(count, x);
      else
        multiply_tile_rows<kTransA, kRows>(count, x);
      x.a += kTransA ? kRows : kRows * x.a_ld;
      x.c += kRows * x.c_ld;
      x.row_scale += kRows;
    }
  }
}

// C = A B, the sum over k in pieces: one chain of up to 576 additions would cost fp32 accuracy.
inline void multiply_in_pieces(int rows, int columns, Product x, OperandB b) {
  constexpr int kPiece = 128;
  const int k = x.k;
  for (int begin = 0; begin < k; begin += kPiece) {
    x.k = k - begin < kPiece ? k - begin : kPiece;
    x.init = begin == 0 ? Init::kZero : Init::kAddSum;
    multiply<false>(rows, columns, x, b, false);
    x.a += kPiece;
    b.data += kPiece * b.row_stride;
  }
}

// ------------------------------------------------------------------------------------------------
// packing
typedef float Vec4 __attribute__((vector_size(16)));

// dst[i][j] = src[j][i] for a 4 x 4 block.
FLASH_INLINE void transpose4(float* dst, int64_t dst_ld, const float* src, int64_t src_ld) {
  Vec4 r[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&r[i], src + i * src_ld, 16);
  const Vec4 a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5),
             b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
  const Vec4 c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7),
             d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  const Vec4 t[4] = {
      __builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
      __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) std::memcpy(dst + i * dst_ld, &t[i], 16);
}

inline constexpr int kRowsAhead = 8;  // prefetched

// What rows are multiplied by when they are packed.
struct OneForAll {
  FLASH_INLINE float operator()(int) const { return 1.f; }
};

// Rows [n][d] become B of a product that sums over d: panels of kTileN rows, element (d, row). Rows
// beyond n are 0. buffer holds kTileN * round_up(d, kTileN) floats.
template <class Row, class Factor = OneForAll>  // Row(i) -> const void*, Factor(i) -> float
inline bool pack_transposed(float* dst, Dtype t, int n, int d, Row row, float* buffer,
                            Factor factor = {}) {
  const int ld = round_up(d, kTileN);
  bool finite = true;
  for (int n0 = 0; n0 < n; n0 += kTileN) {
    const int rows = n - n0 < kTileN ? n - n0 : kTileN;
    for (int i = 0; i < rows; ++i) {
      if (n0 + i + kRowsAhead < n) prefetch_row(t, row(n0 + i + kRowsAhead), d);
      finite &= read_row(t, buffer + i * ld, row(n0 + i), d, ld, factor(n0 + i));
    }
    if (rows < kTileN) std::memset(buffer + rows * ld, 0, (kTileN - rows) * ld * sizeof(float));
    float* panel = dst + static_cast<int64_t>(n0) * ld;
    for (int i = 0; i < d; i += 4)
      for (int j = 0; j < kTileN; j += 4)
        transpose4(panel + i * kTileN + j, kTileN, buffer + j * ld + i, ld);
  }
  return finite;
}
inline OperandB transposed_operand(const float* packed, int d) {
  return {packed, static_cast<int64_t>(kTileN) * round_up(d, kTileN), kTileN};
}

// Rows [n][d] become B of a product that sums over n: panels of kTileN dims, element (row, d). Rows
// n..n_padded are 0.
template <class Row, class Factor = OneForAll>
inline bool pack_natural(float* dst, Dtype t, int n, int n_padded, int d, Row row, float* buffer,
                         Factor factor = {}) {
  const int ld = round_up(d, kTileN);
  bool finite = true;
  for (int i = 0; i < n_padded; ++i) {
    if (i + kRowsAhead < n) prefetch_row(t, row(i + kRowsAhead), d);
    if (i < n)
      finite &= read_row(t, buffer, row(i), d, ld, factor(i));
    else
      std::memset(buffer, 0, ld * sizeof(float));
    for (int p = 0; p < ld; p += kTileN)
      std::memcpy(dst + static_cast<int64_t>(p) * n_padded + i * kTileN, buffer + p,
                  kTileN * sizeof(float));
  }
  return finite;
}
inline OperandB natural_operand(const float* packed, int n_padded) {
  return {packed, static_cast<int64_t>(kTileN) * n_padded, kTileN};
}
// A row-major matrix as B.
inline OperandB row_major_operand(const float* data, int64_t ld) { return {data, kTileN, ld}; }

}  // namespace flash::cpu::FLASH_ATTN_ISA
