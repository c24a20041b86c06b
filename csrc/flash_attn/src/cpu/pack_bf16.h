// Operands of tile products: grids of 1 KiB tiles of 16 x 16 pairs of bf16.
//
//   A   tile (m / 16, k / 32): row m, pairs along k
//   B   tile (n / 16, k / 32): row k / 2, column n, pairs along k
//
// Numbers with more bits than bf16 are sums of terms, each a grid of its own: one term for bf16,
// two for fp16 (exact), three for fp32 (exact but for the last bit).
#pragma once

#include <bit>

#include "base/cpu/rows.h"
#include "base/cpu/scratch.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr int kTileSide = 16;    // rows of any tile, columns of fp32 tiles
inline constexpr int kTileDepth = 32;   // bf16 elements along the sum
inline constexpr int kTileWords = 256;  // pairs, or fp32 elements, of a tile
inline constexpr float kLargestBf16 = 0x1.fep127f;
inline constexpr float kTame = 0x1p50f;  // no sum of products of smaller numbers overflows
static_assert(kTileSide == kWidth);

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
// Both rounded, a's lanes first. Bochs 3.0 has VCVTNE2PS2BF16 wrong.
FLASH_INLINE VecU16x2 round_to_bf16(Vec a, Vec b) {
#if defined(__AVX512BF16__) && defined(FLASH_ATTN_SIMD_AVX512) && !defined(FLASH_ATTN_FOR_BOCHS)
  return reinterpret_cast<VecU16x2>(_mm512_cvtne2ps_pbh(b, a));
#else
  const VecU16 r[2] = {round_to_bf16(a), round_to_bf16(b)};
  VecU16x2 both;
  std::memcpy(&both, r, sizeof(both));
  return both;
#endif
}
// Calls f(i, term i of a, term i of b): the bf16 nearest to what the terms before leave. kBounded:
// the numbers are NaN or no larger than kLargestBf16.
template <int kTerms, bool kBounded, class F>
FLASH_INLINE void split(Vec a, Vec b, F f) {
  if constexpr (kTerms == 1) {
    f(0, round_to_bf16(a), round_to_bf16(b));
  } else if constexpr (kBounded) {
    for (int i = 0; i < kTerms; ++i) {
      const VecU16 term_a = round_to_bf16(a), term_b = round_to_bf16(b);
      f(i, term_a, term_b);
      a -= bf16_to_float(term_a);
      b -= bf16_to_float(term_b);
    }
  } else {
    // Infinity leaves 0, and nothing finite is rounded up to it.
    const auto first = [](Vec v) {
      const VecI is_cut = (abs(v) > kLargestBf16) & (abs(v) < __builtin_inff());
      return round_to_bf16(select(is_cut, from_bits(bits(v) & 0xffff0000u), v));
    };
    const auto rest = [](Vec v, VecU16 term) {
      return select(abs(v) < __builtin_inff(), v - bf16_to_float(term), zero());
    };
    const VecU16 first_a = first(a), first_b = first(b);
    f(0, first_a, first_b);
    split<kTerms - 1, true>(rest(a, first_a), rest(b, first_b),
                            [&](int i, VecU16 term_a, VecU16 term_b) { f(i + 1, term_a, term_b); });
  }
}

// Rows as bf16 terms: dst[term * term_stride + i] for i < padded, a multiple of 32; zeros from d
// on. Whether all are tame.
template <int kTerms>
inline bool split_row(uint16_t* dst, int64_t term_stride, const float* src, int padded) {
  VecU largest{};  // magnitudes are ordered as their bits, NaN last
  const auto add = [&](VecU x) { largest = x << 1 > largest ? x << 1 : largest; };
  for (int i = 0; i < padded; i += 2 * kWidth) {
    const Vec low = load(src + i), high = load(src + i + kWidth);
    add(bits(low));
    add(bits(high));
    split<kTerms, false>(low, high, [&](int t, VecU16 a, VecU16 b) {
      store_u16(dst + t * term_stride + i, a);
      store_u16(dst + t * term_stride + i + kWidth, b);
    });
  }
  return all_of(largest < std::bit_cast<uint32_t>(kTame) << 1);
}
// d is a multiple of 32.
inline bool all_finite_bf16(const uint16_t* row, int d) {
  VecU16x2 largest{};
  for (int i = 0; i < d; i += 2 * kWidth) {
    const VecU16x2 exponent = load_u16x2(row + i) & uint16_t{0x7f80};
    largest = exponent > largest ? exponent : largest;
  }
  const VecU pairs = reinterpret_cast<VecU>(largest);
  return all_of(((pairs & 0xffffu) != 0x7f80u) & ((pairs >> 16) != 0x7f80u));
}
// The terms of a row of any dtype. False if products of its terms may be NaN where those of its
// elements are not: one is inf or NaN or, of several terms, not tame. buffer holds padded floats.
template <int kTerms>
inline bool read_terms(Dtype type, uint16_t* dst, int64_t term_stride, const void* src, int d,
                       int padded, float* buffer) {
  if (kTerms > 1 || type != Dtype::kBFloat16) {
    const bool finite = read_row(type, buffer, src, d, padded);
    const bool tame = split_row<kTerms>(dst, term_stride, buffer, padded);
    return kTerms > 1 ? tame : finite;
  }
  const auto* row = static_cast<const uint16_t*>(src);
  const int whole = d / (2 * kWidth) * (2 * kWidth);
  bool finite = all_finite_bf16(row, whole);
  std::memcpy(dst, row, whole * sizeof(uint16_t));
  if (whole < d) {
    alignas(64) uint16_t tail[2 * kWidth] = {};
    std::memcpy(tail, row + whole, (d - whole) * sizeof(uint16_t));
    store_u16x2(dst + whole, load_u16x2(tail));
    finite &= all_finite_bf16(tail, 2 * kWidth);
  }
  return finite;
}

// Of each block of four lanes the low (kHigh = 0) or high two, a's and b's in turns, kGroup at a
// time.
template <int kGroup, int kHigh, int... kLane>
FLASH_INLINE Vec unpack(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b,
                                 (kLane / 4 * 4 + kLane % kGroup + kLane % 4 / (2 * kGroup) +
                                  2 * kHigh + (kLane & kGroup ? kWidth : 0))...);
}
template <int kGroup, int kHigh>
FLASH_INLINE Vec unpack(Vec a, Vec b) {
  return unpack<kGroup, kHigh>(a, b, std::make_integer_sequence<int, kWidth>{});
}
// The even (kOdd = 0) or odd blocks of four lanes, a's, then b's.
template <int kOdd, int... kLane>
FLASH_INLINE Vec every_other_block(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(
      a, b, (kLane / 4 % 2 * 8 + 4 * kOdd + kLane % 4 + (kLane < kWidth / 2 ? 0 : kWidth))...);
}
template <int kOdd>
FLASH_INLINE Vec every_other_block(Vec a, Vec b) {
  return every_other_block<kOdd>(a, b, std::make_integer_sequence<int, kWidth>{});
}
// dst[j][i] = r[i][j] of a tile's 16 x 16 words; rows lie dst_ld words apart. Uses r up.
FLASH_INLINE void store_transpose(uint32_t* dst, int64_t dst_ld, Vec (&r)[16]) {
  static_assert(kWidth == 16);
  Vec t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = unpack<1, 0>(r[i], r[i + 1]);
    t[i + 1] = unpack<1, 1>(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    const int row = i / 2 * 4 + i % 2;
    r[2 * i] = unpack<2, 0>(t[row], t[row + 2]);
    r[2 * i + 1] = unpack<2, 1>(t[row], t[row + 2]);
  }
  // r[4 g + i]: columns i, 4 + i, 8 + i, 12 + i of rows [4 g, 4 g + 4).
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    t[i] = every_other_block<0>(r[i], r[4 + i]);
    t[4 + i] = every_other_block<0>(r[8 + i], r[12 + i]);
    t[8 + i] = every_other_block<1>(r[i], r[4 + i]);
    t[12 + i] = every_other_block<1>(r[8 + i], r[12 + i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    r[i] = every_other_block<0>(t[i], t[4 + i]);
    r[8 + i] = every_other_block<1>(t[i], t[4 + i]);
    r[4 + i] = every_other_block<0>(t[8 + i], t[12 + i]);
    r[12 + i] = every_other_block<1>(t[8 + i], t[12 + i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) std::memcpy(dst + i * dst_ld, &r[i], sizeof(Vec));
}
// The same of src, whose rows lie src_ld words apart.
inline void transpose_tile(uint32_t* dst, int64_t dst_ld, const uint32_t* src, int64_t src_ld) {
  Vec r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) std::memcpy(&r[i], src + i * src_ld, sizeof(Vec));
  store_transpose(dst, dst_ld, r);
}

FLASH_INLINE void store_pairs(uint32_t* dst, VecU pairs) {
  std::memcpy(dst, &pairs, sizeof(pairs));
}
// Rows [first, first + count) of `end` rows of d elements.
struct RowGroup {
  Dtype type;
  int first, count, end, d;
};

// Where packing finds a group of rows.
struct Staging {
  uint16_t* rows;        // [terms][32][ld]
  const uint16_t** row;  // [32]: theirs, or the caller's where those need no change
  uint32_t* pairs;       // [16][ld]
  float* buffer;         // [ld]
  int ld;                // the longest row, a multiple of 32
  FLASH_INLINE const uint16_t* term(int t, int i) const {
    return row[i] + int64_t{t} * kTileDepth * ld;
  }
};
inline Staging carve_staging(Carver& c, int terms, int ld) {
  return {c.take<uint16_t>(int64_t{terms} * kTileDepth * ld), c.take<const uint16_t*>(kTileDepth),
          c.take<uint32_t>(int64_t{16} * ld), c.take<float>(ld), ld};
}
// A row of `padded` floats as staged row i.
template <int kTerms>
inline void stage_floats(const Staging& s, int i, const float* src, int padded) {
  uint16_t* dst = s.rows + int64_t{i} * s.ld;
  split_row<kTerms>(dst, int64_t{kTileDepth} * s.ld, src, padded);
  s.row[i] = dst;
}

// Zeros in place of inf and NaN.
template <int kTerms>
inline void clear_not_finite(uint16_t* row, int64_t term_stride, int padded) {
  for (int t = 0; t < kTerms; ++t)
    for (int i = 0; i < padded; ++i)
      if ((row[t * term_stride + i] & 0x7f80u) == 0x7f80u) row[t * term_stride + i] = 0;
}

// Stages rows [first, first + count) of a group, missing ones as zeros. Rows that a sum
// runs over may hold inf and NaN that a mask hides: with `spoilt` given, zeros take their place
// and spoilt[i] says whether row first + i may have had any. False if terms of any row may not do
// (read_terms).
template <int kTerms, class Row>  // Row(i) -> const void*
inline bool stage_rows(const Staging& s, const RowGroup& g, Row row, uint8_t* spoilt) {
  const int padded = (g.d + kTileDepth - 1) / kTileDepth * kTileDepth;
  const int64_t term_stride = int64_t{kTileDepth} * s.ld;
  const bool in_place = kTerms == 1 && g.type == Dtype::kBFloat16 && g.d == padded;
  bool all_finite = true;
  for (int i = 0; i < g.count; ++i) {
    if (const int ahead = g.first + i + kTileDepth; ahead < g.end)
      prefetch_row(g.type, row(ahead), g.d);
    uint16_t* dst = s.rows + int64_t{i} * s.ld;
    bool finite = true;
    s.row[i] = dst;
    const void* src = g.first + i < g.end ? row(g.first + i) : nullptr;
    if (src == nullptr) {
      for (int t = 0; t < kTerms; ++t)
        std::memset(dst + t * term_stride, 0, padded * sizeof(uint16_t));
    } else if (in_place) {
      s.row[i] = static_cast<const uint16_t*>(src);
      finite = all_finite_bf16(s.row[i], padded);
    } else {
      finite = read_terms<kTerms>(g.type, dst, term_stride, src, g.d, padded, s.buffer);
    }
    if (!finite && spoilt) {
      if (s.row[i] != dst) std::memcpy(dst, s.row[i], padded * sizeof(uint16_t));
      s.row[i] = dst;
      clear_not_finite<kTerms>(dst, term_stride, padded);
    }
    if (spoilt) spoilt[i] = !finite;
    all_finite &= finite;
  }
  return all_finite;
}

inline bool is_finite(float x) { return __builtin_fabsf(x) < __builtin_inff(); }

// c[i * stride] += weight * x for the elements x of a row that are inf or NaN, or for all.
inline void add_not_finite(float* c, int64_t stride, float weight, Dtype type, const void* row,
                           int d, bool all = false) {
  for (int i = 0; i < d; ++i) {
    const float x = load_scalar(row, type, i);
    if (all || !is_finite(x)) c[i * stride] += weight * x;
  }
}

// A staged row as row `row` of A, or of several A side by side.
template <int kTerms>
inline void copy_staged_row(const Packed& a, int row, const Staging& s, int staged_row) {
  for (int t = 0; t < kTerms; ++t) {
    const uint16_t* src = s.term(t, staged_row);
    for (int k = 0; k < a.depth_tiles; ++k)
      std::memcpy(a.tile(t, row / kTileSide, k) + row % kTileSide * 16, src + k * kTileDepth, 64);
  }
}

// 16 staged rows as columns [16 n, 16 n + 16) of B: sums run along the rows (K in Q K^T).
template <int kTerms>
inline void pack_columns(const Packed& b, int n, const Staging& s, int staged_row) {
  for (int t = 0; t < kTerms; ++t) {
    for (int k = 0; k < b.depth_tiles; ++k) {
      Vec r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        std::memcpy(&r[i], s.term(t, staged_row + i) + k * kTileDepth, sizeof(Vec));
      store_transpose(b.tile(t, n, k), 16, r);
    }
  }
}

// Columns [32 j, 32 j + 32) of pair i of 32 staged rows. The rows of a pair lie kDistance apart: 1
// (2 i, 2 i + 1) or 16 (i, i + 16).
struct RowPair {
  VecU16x2 a, b;
};
template <int kDistance>
FLASH_INLINE RowPair row_pair(const Staging& s, int term, int i, int j) {
  static_assert(kDistance == 1 || kDistance == 16);
  const int first = kDistance == 1 ? 2 * i : i;
  return {load_u16x2(s.term(term, first) + j * kTileDepth),
          load_u16x2(s.term(term, first + kDistance) + j * kTileDepth)};
}

// 32 staged rows of `d` elements, a multiple of 32, as rows [32 k, 32 k + 32) of B: sums run over
// the rows (V in P V).
template <int kTerms, int kDistance = 1>
inline void pack_pairs(const Packed& b, int k, int d, const Staging& s) {
  for (int t = 0; t < kTerms; ++t)
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < d / kTileDepth; ++j) {
        const RowPair p = row_pair<kDistance>(s, t, i, j);
        store_pairs(b.tile(t, 2 * j, k) + i * 16, pairs<0>(p.a, p.b));
        store_pairs(b.tile(t, 2 * j + 1, k) + i * 16, pairs<kWidth>(p.a, p.b));
      }
}

// 32 staged rows of `d` elements as columns [32 k, 32 k + 32) of A: A is their transpose.
template <int kTerms, int kDistance = 1>
inline void pack_transpose(const Packed& a, int k, int d, const Staging& s) {
  for (int t = 0; t < kTerms; ++t)
    for (int j = 0; j < d / kTileDepth; ++j) {
      Vec low[16], high[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const RowPair p = row_pair<kDistance>(s, t, i, j);
        low[i] = from_bits(pairs<0>(p.a, p.b));
        high[i] = from_bits(pairs<kWidth>(p.a, p.b));
      }
      store_transpose(a.tile(t, 2 * j, k), 16, low);
      store_transpose(a.tile(t, 2 * j + 1, k), 16, high);
    }
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
