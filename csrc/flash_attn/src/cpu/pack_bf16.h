// Operands of tile products: grids of 1 KiB tiles of 16 x 16 pairs of bf16.
//
//   A   tile (m / 16, k / 32): row m, pairs along k
//   B   tile (n / 16, k / 32): row k / 2, column n, pairs along k
//
// Numbers with more bits than bf16 are sums of terms, each a grid of its own: one term for bf16,
// two for fp16 (exact), three for fp32 (exact but for the last bit).
#pragma once

#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr int kTileSide = 16;    // rows of any tile, columns of fp32 tiles
inline constexpr int kTileDepth = 32;   // bf16 elements along the sum
inline constexpr int kTileWords = 256;  // pairs, or fp32 elements, of a tile
inline constexpr float kLargestBf16 = 0x1.fep127f;
static_assert(kTileSide % kWidth == 0);

struct Packed {
  uint32_t* data;
  int64_t term_words;  // from one term's grid to the next
  int depth_tiles;     // tiles along the sum
  FLASH_INLINE uint32_t* tile(int term, int i, int k) const {
    return data + term * term_words + (int64_t{i} * depth_tiles + k) * kTileWords;
  }
};
// A grid for rows x depth elements, both multiples of a tile's.
inline Packed packed_grid(uint32_t* data, int64_t rows, int64_t depth) {
  return {data, rows * depth / 2, static_cast<int>(depth / kTileDepth)};
}
inline constexpr int64_t packed_words(int64_t rows, int64_t depth, int terms) {
  return rows * depth / 2 * terms;
}

// Round to nearest even; NaN stays NaN, subnormal results may become 0.
FLASH_INLINE VecU16 round_to_bf16(Vec v) {
#if defined(__AVX512BF16__) && defined(FLASH_ATTN_SIMD_AVX512)
  return reinterpret_cast<VecU16>(_mm512_cvtneps_pbh(v));
#else
  return float_to_bf16(v);
#endif
}

// term[i] = the bf16 nearest to what the terms before leave of x.
template <int kTerms>
FLASH_INLINE void split(Vec x, VecU16 (&term)[kTerms]) {
  if constexpr (kTerms == 1) {
    term[0] = round_to_bf16(x);
    return;
  }
  const VecI is_finite = abs(x) < __builtin_inff();
  Vec rest = x;
  for (int i = 0; i < kTerms; ++i) {
    // Not rounded up to infinity: that would leave -infinity.
    const VecI overflow = is_finite & (abs(rest) > kLargestBf16);
    term[i] = round_to_bf16(select(overflow, from_bits(bits(rest) & 0xffff0000u), rest));
    rest = select(is_finite, rest - bf16_to_float(term[i]), zero());
  }
}

// Rows as bf16 terms: dst[term * term_stride + i] for i < padded, a multiple of 32; zeros from d
// on. False if any element is inf or NaN. buffer holds padded floats.
template <int kTerms>
inline void split_row(uint16_t* dst, int64_t term_stride, const float* src, int padded) {
  for (int i = 0; i < padded; i += kWidth) {
    VecU16 term[kTerms];
    split<kTerms>(load(src + i), term);
    for (int t = 0; t < kTerms; ++t) store_u16(dst + t * term_stride + i, term[t]);
  }
}
template <int kTerms>
inline bool read_terms(Dtype type, uint16_t* dst, int64_t term_stride, const void* src, int d,
                       int padded, float* buffer) {
  if (kTerms > 1 || type != Dtype::kBFloat16) {
    const bool finite = read_row(type, buffer, src, d, padded);
    split_row<kTerms>(dst, term_stride, buffer, padded);
    return finite;
  }
  std::memcpy(dst, src, d * sizeof(uint16_t));
  std::memset(dst + d, 0, (padded - d) * sizeof(uint16_t));
  VecI finite = set1i(-1);
  for (int i = 0; i < padded; i += kWidth)
    finite &= (__builtin_convertvector(load_u16(dst + i), VecU) & 0x7f80u) != 0x7f80u;
  return all_of(finite);
}

// Exchanges the off-diagonal blocks of kStep x kStep words.
template <int kStep, int... kLane>
FLASH_INLINE void swap_blocks(Vec (&r)[16], std::integer_sequence<int, kLane...>) {
  static_assert(kWidth == 16);
  for (int i = 0; i < 16; ++i) {
    if (i & kStep) continue;
    const Vec a = r[i], b = r[i + kStep];
    r[i] = __builtin_shufflevector(a, b, (kLane & kStep ? 16 + kLane - kStep : kLane)...);
    r[i + kStep] = __builtin_shufflevector(a, b, (kLane & kStep ? 16 + kLane : kLane + kStep)...);
  }
}
template <int kStep>
FLASH_INLINE void swap_blocks(Vec (&r)[16]) {
  swap_blocks<kStep>(r, std::make_integer_sequence<int, 16>{});
}
// dst[j][i] = src[i][j] of a tile's 16 x 16 words; rows lie dst_ld and src_ld words apart.
inline void transpose_tile(uint32_t* dst, int64_t dst_ld, const uint32_t* src, int64_t src_ld) {
  Vec r[16];
  for (int i = 0; i < 16; ++i) std::memcpy(&r[i], src + i * src_ld, sizeof(Vec));
  swap_blocks<8>(r);
  swap_blocks<4>(r);
  swap_blocks<2>(r);
  swap_blocks<1>(r);
  for (int i = 0; i < 16; ++i) std::memcpy(dst + i * dst_ld, &r[i], sizeof(Vec));
}

FLASH_INLINE void store_pairs(uint32_t* dst, VecU16 even, VecU16 odd) {
  const VecU pairs = __builtin_convertvector(even, VecU) | __builtin_convertvector(odd, VecU) << 16;
  std::memcpy(dst, &pairs, sizeof(pairs));
}

// Two rows of bf16 to one of pairs.
inline void interleave_rows(uint32_t* dst, const uint16_t* even, const uint16_t* odd, int n) {
  for (int i = 0; i < n; i += kWidth) store_pairs(dst + i, load_u16(even + i), load_u16(odd + i));
}

// Rows [first, first + count) of `end` rows of d elements.
struct RowGroup {
  Dtype type;
  int first, count, end, d;
};

// Where packing keeps a group of rows before it knows their neighbours.
struct Staging {
  uint16_t* rows;   // [terms][32][ld]
  uint32_t* pairs;  // [16][ld]
  float* buffer;    // [ld]
  int ld;           // the longest row, a multiple of 32
};
inline Staging carve_staging(Carver& c, int terms, int ld) {
  return {c.take<uint16_t>(int64_t{terms} * kTileDepth * ld), c.take<uint32_t>(int64_t{16} * ld),
          c.take<float>(ld), ld};
}

// Zeros in place of inf and NaN.
template <int kTerms>
inline void clear_not_finite(uint16_t* row, int64_t term_stride, int padded) {
  for (int t = 0; t < kTerms; ++t)
    for (int i = 0; i < padded; ++i)
      if ((row[t * term_stride + i] & 0x7f80u) == 0x7f80u) row[t * term_stride + i] = 0;
}

// Reads rows [first, first + group) of n into the staging, missing ones as zeros. Rows that a sum
// runs over may hold inf and NaN that a mask hides: with `spoilt` given, zeros take their place
// and spoilt[i] says whether row first + i had any. True if it had none anywhere.
template <int kTerms, class Row>  // Row(i) -> const void*
inline bool stage_rows(const Staging& s, const RowGroup& g, Row row, uint8_t* spoilt) {
  const int padded = (g.d + kTileDepth - 1) / kTileDepth * kTileDepth;
  const int64_t term_stride = int64_t{kTileDepth} * s.ld;
  bool all_finite = true;
  for (int i = 0; i < g.count; ++i) {
    uint16_t* dst = s.rows + int64_t{i} * s.ld;
    bool finite = true;
    if (g.first + i < g.end) {
      finite =
          read_terms<kTerms>(g.type, dst, term_stride, row(g.first + i), g.d, padded, s.buffer);
      if (!finite && spoilt) clear_not_finite<kTerms>(dst, term_stride, padded);
    } else {
      for (int t = 0; t < kTerms; ++t)
        std::memset(dst + t * term_stride, 0, padded * sizeof(uint16_t));
    }
    if (spoilt) spoilt[i] = !finite;
    all_finite &= finite;
  }
  return all_finite;
}

// c[i * stride] += weight * x for the elements x of a row that are inf or NaN.
inline void add_not_finite(float* c, int64_t stride, float weight, Dtype type, const void* row,
                           int d) {
  for (int i = 0; i < d; ++i) {
    const float x = load_scalar(row, type, i);
    if (!(__builtin_fabsf(x) < __builtin_inff())) c[i * stride] += weight * x;
  }
}

// A staged row as row `row` of A, or of several A side by side.
template <int kTerms>
inline void copy_staged_row(const Packed& a, int row, const Staging& s, int staged_row) {
  for (int t = 0; t < kTerms; ++t) {
    const uint16_t* src = s.rows + (int64_t{t} * kTileDepth + staged_row) * s.ld;
    for (int k = 0; k < a.depth_tiles; ++k)
      std::memcpy(a.tile(t, row / kTileSide, k) + row % kTileSide * 16, src + k * kTileDepth, 64);
  }
}

// 16 staged rows as columns [16 n, 16 n + 16) of B: sums run along the rows (K in Q K^T).
template <int kTerms>
inline void pack_columns(const Packed& b, int n, const Staging& s, int staged_row) {
  for (int t = 0; t < kTerms; ++t) {
    const uint16_t* src = s.rows + (int64_t{t} * kTileDepth + staged_row) * s.ld;
    for (int k = 0; k < b.depth_tiles; ++k)
      transpose_tile(b.tile(t, n, k), 16, reinterpret_cast<const uint32_t*>(src + k * kTileDepth),
                     s.ld / 2);
  }
}

// 32 staged rows of `d` elements as rows [32 k, 32 k + 32) of B: sums run over the rows (V in P V).
template <int kTerms>
inline void pack_pairs(const Packed& b, int k, int d, const Staging& s) {
  for (int t = 0; t < kTerms; ++t)
    for (int i = 0; i < 16; ++i) {
      const uint16_t* even = s.rows + (int64_t{t} * kTileDepth + 2 * i) * s.ld;
      interleave_rows(s.pairs, even, even + s.ld, d);
      for (int n = 0; n < d / kTileSide; ++n)
        std::memcpy(b.tile(t, n, k) + i * 16, s.pairs + n * kTileSide, 64);
    }
}

// 32 staged rows of `d` elements as columns [32 k, 32 k + 32) of A: A is their transpose.
template <int kTerms>
inline void pack_transpose(const Packed& a, int k, int d, const Staging& s) {
  for (int t = 0; t < kTerms; ++t) {
    for (int i = 0; i < 16; ++i) {
      const uint16_t* even = s.rows + (int64_t{t} * kTileDepth + 2 * i) * s.ld;
      interleave_rows(s.pairs + int64_t{i} * s.ld, even, even + s.ld, d);
    }
    for (int m = 0; m < d / kTileSide; ++m)
      transpose_tile(a.tile(t, m, k), 16, s.pairs + m * kTileSide, s.ld);
  }
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
