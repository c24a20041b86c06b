// P and dS of the backward on bf16 tiles: made from S and dP, a row of each of a unit's two tiles
// at a time, and stored in the three forms that products take.
//
// A unit is 32 rows x 32 keys. Rows r and r + 16 lie in one pair, and so do keys j and j + 16: then
// each vector of any form is the upper halves of two vectors of weights.
//
//   p, ds_pairs   B of dV^T and dK^T, sums over rows: a row of 16 keys, pairs of rows
//   ds            A of dQ, sums over keys: a row of pairs of keys
#pragma once

#include "cpu/bwd_context.h"
#include "cpu/tile_units.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr int kBwdBlockKeys = 256;
inline constexpr int kBwdRandomKeys = 64;  // bytes of dropout are made for so many
static_assert(kUnitKeys == kTileDepth && kBlockRows == kTileDepth);
inline constexpr int kHalf = 16;  // from a row or key to its partner

// The largest block of rows with so many terms.
inline constexpr int bwd_block_rows(int terms) { return 256 / terms / kBlockRows * kBlockRows; }

// a's upper halves in the lower halves, b's in the upper.
FLASH_INLINE VecU upper_halves(VecU a, VecU b) {
#if defined(FLASH_ATTN_SIMD_AVX512) && defined(__AVX512BW__)
  // One instruction, and not on the port of FMAs, shifts and conversions.
  const __m512i swap = _mm512_set4_epi32(0x0d0c0f0e, 0x09080b0a, 0x05040706, 0x01000302);
  return reinterpret_cast<VecU>(_mm512_mask_shuffle_epi8(
      reinterpret_cast<__m512i>(b), 0x3333333333333333ull, reinterpret_cast<__m512i>(a), swap));
#else
  return a >> 16 | (b & 0xffff0000u);
#endif
}

// The upper halves of terms[i] are term i: the bf16 nearest to what the terms before leave, ties
// away from 0. kBounded: the number is NaN or no larger than kLargestBf16. The payload of a NaN is
// not to begin with ones only.
template <int kTerms, bool kBounded>
FLASH_INLINE void split_halves(Vec v, VecU (&terms)[kTerms]) {
#pragma GCC unroll 3
  for (int i = 0; i < kTerms; ++i) {
    terms[i] = bits(v) + 0x8000u;
    if (i == kTerms - 1) return;
    VecU term = terms[i] & 0xffff0000u;
    if (!kBounded && i == 0) {
      // Infinity leaves 0, and nothing finite is rounded up to it.
      const VecI finite = abs(v) < __builtin_inff(), is_cut = (abs(v) > kLargestBf16) & finite;
      term = is_cut ? bits(v) & 0xffff0000u : term;
      terms[0] = term;
      v = select(finite, v - from_bits(term), zero());
    } else {
      v -= from_bits(term);
    }
  }
}

// NaN without payload.
FLASH_INLINE Vec plain_nan(Vec v) { return select(v == v, v, set1(__builtin_nanf(""))); }
inline float plain_nan(float v) { return v == v ? v : __builtin_nanf(""); }

// Where a row of P and dS goes; its partner's places follow from it.
template <int kTerms>
struct WeightsOutput {
  static constexpr int kRows = bwd_block_rows(kTerms);
  static constexpr int64_t kPairsColumn = int64_t{kRows} / kTileDepth * kTileWords;  // 16 keys
  static constexpr int64_t kPairsTerm = packed_words(kRows, kUnitKeys, 1);
  static constexpr int64_t kDsRows = int64_t{kBwdBlockKeys} / kTileDepth * kTileWords;  // 16 rows
  static constexpr int64_t kDsTerm = packed_words(kRows, kBwdBlockKeys, 1);

  uint32_t *p, *ds;  // ds_pairs lies behind all terms of p

  FLASH_INLINE static constexpr int64_t ds_pairs() { return kTerms * kPairsTerm; }
  FLASH_INLINE WeightsOutput row(int i) const { return {p + i * kTileSide, ds + i * kTileSide}; }
  // [row, its partner][keys, their partners].
  FLASH_INLINE void store(const Vec (&weights)[2][2], const Vec (&gradients)[2][2]) const {
    store_all<true>(weights,
                    [&](int t, const VecU(&w)[2][2]) { store_columns(p + t * kPairsTerm, w); });
    store_all<false>(gradients, [&](int t, const VecU(&w)[2][2]) {
      store_columns(p + ds_pairs() + t * kPairsTerm, w);
      store_pairs(ds + t * kDsTerm, upper_halves(w[0][0], w[0][1]));
      store_pairs(ds + t * kDsTerm + kDsRows, upper_halves(w[1][0], w[1][1]));
    });
  }

 private:
  FLASH_INLINE static void store_columns(uint32_t* dst, const VecU (&w)[2][2]) {
    store_pairs(dst, upper_halves(w[0][0], w[1][0]));
    store_pairs(dst + kPairsColumn, upper_halves(w[0][1], w[1][1]));
  }
  template <bool kBounded, class F>
  FLASH_INLINE static void store_all(const Vec (&x)[2][2], F f) {
    VecU terms[2][2][kTerms];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) split_halves<kTerms, kBounded>(x[i][j], terms[i][j]);
#pragma GCC unroll 3
    for (int t = 0; t < kTerms; ++t) {
      const VecU w[2][2] = {{terms[0][0][t], terms[0][1][t]}, {terms[1][0][t], terms[1][1][t]}};
      f(t, w);
    }
  }
};

// How a unit's products become P and dS.
enum class Weighing {
  kPlain,     // the products are the scores, and every row sees every key
  kMasked,    // some rows do not
  kModified,  // by ModifiedPairs
  kRowByRow,  // by softmax_bwd_step
};

// Rows [32 sub, 32 sub + rows) of a block over 32 keys.
template <int kTerms>
struct BwdUnit {
  int sub, row0, rows;
  int key, first_key;  // key: of the chunk
  float* s;            // [32][kUnitKeys], and behind it dP
  const float* lse;    // of the first row, as below
  const Row* row;
  WeightsOutput<kTerms> out;  // of the first row
  Weighing weighing;
  bool all_see;  // there are 32 rows, and each sees every key
};

struct StreamsBOnly {};
struct StreamsAOnly {
  using StreamsA = void;
};
// What runs between the tile products of a sum: the next 2 x 2 tiles come into L1.
template <int kLines, bool kStreamsA = true>
struct PrefetchTiles : std::conditional_t<kStreamsA, StreamsAOnly, StreamsBOnly> {
  explicit PrefetchTiles(const float* tiles) : next(tiles) {}
  FLASH_INLINE void operator()() {
#pragma GCC unroll 4
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(next + i * 16, 1);
    next += kLines * 16;
  }
  const float* next;
};

// P and dS of a unit's rows, spread over the first `steps` calls. What the loop needs lies in
// registers.
template <class Terms, Weighing kWeighing>
class SpreadPairs {
 public:
  using StreamsA = void;
  static constexpr int kTerms = Terms::kTerms;

  // factor: from products to exponents.
  FLASH_INLINE SpreadPairs(const BwdUnit<kTerms>& unit, float factor, int steps)
      : out_(unit.out),
        s_(unit.s),
        lse_(unit.lse),
        row_(unit.row),
        first_key_(unit.first_key),
        factor_(factor),
        steps_(steps) {}

  FLASH_INLINE void operator()() {
    for (due_ += kHalf; due_ >= steps_ && left_ > 0; due_ -= steps_) weigh();
  }

 private:
  FLASH_INLINE void weigh() {
    Vec p[2][2], ds[2][2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const float* s = s_ + i * kHalf * kUnitKeys;
      const float* dp = s + kBlockRows * kUnitKeys;
      const Vec lse = set1(lse_[i * kHalf]),
                delta = set1(lse_[i * kHalf + WeightsOutput<kTerms>::kRows]);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        p[i][j] = exp2_for(Terms{}, fma(load(s + j * kHalf), set1(factor_), lse));
        ds[i][j] = p[i][j] * (load(dp + j * kHalf) - delta);
        if constexpr (kWeighing == Weighing::kMasked) {
          const KeyRange keys = row_[i * kHalf].keys;
          const VecI key = iota() + (first_key_ + j * kHalf);
          const VecI seen = (key >= keys.begin) & (key < keys.end);
          p[i][j] = select(seen, p[i][j], zero());
          ds[i][j] = select(seen, ds[i][j], zero());
        }
      }
    }
    out_.store(p, ds);
    out_ = out_.row(1);
    s_ += kUnitKeys;
    ++lse_;
    ++row_;
    --left_;
  }

  WeightsOutput<kTerms> out_;
  const float *s_, *lse_;  // dP lies behind S, delta behind lse
  const Row* row_;
  int first_key_;
  float factor_;
  int steps_, due_ = 0, left_ = kHalf;
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
