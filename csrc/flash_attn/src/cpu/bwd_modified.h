// P and dS of the backward on bf16 tiles where scores are modified or dropout drops weights: a row
// of each of a unit's two tiles at a time, as SpreadPairs (bwd_weights.h) does the others.
#pragma once

#include "cpu/bwd_weights.h"
#include "cpu/tanh_table.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// tanh(x) and its derivative to the accuracy that weights of these terms keep.
template <class Terms>
FLASH_INLINE TanhAndSlope tanh_and_slope_for(Terms, Vec x) {
  if constexpr (Terms::kTerms == 3) return tanh_of_half(x + x);
  const Vec value = tanh_by_table(x);
  return {value, fma(-value, value, set1(1.f))};
}

// What a call does to scores and weights.
enum class Modification : unsigned { kSoftcap = 1, kAlibi = 2, kBias = 4, kDropout = 8 };

inline unsigned modifications(const Flash_bwd_params& p) {
  const auto if_given = [](bool given, Modification m) {
    return given ? static_cast<unsigned>(m) : 0;
  };
  return if_given(p.softcap > 0.f, Modification::kSoftcap) |
         if_given(p.alibi_slopes != nullptr, Modification::kAlibi) |
         if_given(p.bias.ptr != nullptr, Modification::kBias) |
         if_given(p.p_dropout > 0.f, Modification::kDropout);
}
// Whether ModifiedPairs takes a unit's keys: all exist, or have no bias of their own.
inline bool takes_keys(const BwdContext& ctx, int first_key) {
  const Bias& bias = ctx.p.bias;
  return !bias.ptr || (bias.col_stride == 1 && first_key + kUnitKeys <= ctx.seq.seqlen_k);
}

// kKnown: the modifications of the call, or 0 where the compiler does not know them.
template <class Terms, unsigned kKnown>
class ModifiedPairs {
 public:
  static constexpr int kTerms = Terms::kTerms;
  // Three terms would show that an FMA with the row's LSE rounds otherwise than the forward did:
  // there exponents are natural until it has been subtracted.
  static constexpr bool kNatural = kTerms == 3;
  static constexpr float kUnits = kNatural ? 1.f : kLog2e;  // of exponents, and of unit.lse

  // random: dropout's bytes of the unit's first row, those of others `random_ld` bytes on.
  FLASH_INLINE ModifiedPairs(const BwdContext& ctx, const BwdUnit<kTerms>& unit,
                             const uint8_t* random, int64_t random_ld)
      : ctx_(ctx),
        modifications_(modifications(ctx.p)),
        out_(unit.out),
        s_(unit.s),
        lse_(unit.lse),
        row_(unit.row),
        random_(random),
        random_ld_(random_ld),
        first_key_(unit.first_key),
        left_(unit.rows),
        all_see_(unit.all_see),
        factor_(ctx.score_scale * kUnits),
        inverse_softcap_(ctx.score_scale / ctx.p.softcap),
        softcap_(ctx.p.softcap * kUnits) {}

  // The next two rows.
  [[gnu::noinline]] void weigh() {
    Pairs x, p, ds;
    [[maybe_unused]] Pairs cap_slope;
    if constexpr (kKnown == 0) cap_slope = {};
    if (has<Modification::kSoftcap>())
      for_pairs([&](int half, int j) {
        const TanhAndSlope t = tanh_and_slope_for(Terms{}, product(half, j) * inverse_softcap_);
        x.v[half][j] = begin(t.value, softcap_, half);
        cap_slope.v[half][j] = t.slope;
      });
    else
      for_pairs([&](int half, int j) { x.v[half][j] = begin(product(half, j), factor_, half); });
    if (has<Modification::kAlibi>()) add_alibi(x);
    if (has<Modification::kBias>())
      with_dtype(ctx_.p.bias.dtype,
                 [&]<Dtype T>() __attribute__((always_inline)) { add_bias<T>(x); });
    if constexpr (kNatural)
      for_pairs([&](int half, int j) { x.v[half][j] = (x.v[half][j] + lse(half)) * kLog2e; });
    for_pairs([&](int half, int j) { p.v[half][j] = normal_exp2_for(Terms{}, x.v[half][j]); });
    if (has<Modification::kDropout>()) {
      const Vec rescale = set1(ctx_.dropout.rescale);
      for_pairs([&](int half, int j) {
        const auto keep = kept(ctx_.dropout, random_ + half * kHalf * random_ld_, j * kWidth);
        const Vec dp = select(keep, product(half, j, kUnitScores), zero());
        ds.v[half][j] = p.v[half][j] * fma(dp, rescale, -delta(half));
        p.v[half][j] = select(keep, p.v[half][j] * rescale, zero());
      });
    } else {
      for_pairs([&](int half, int j) {
        ds.v[half][j] = p.v[half][j] * (product(half, j, kUnitScores) - delta(half));
      });
    }
    if (has<Modification::kBias>() && ctx_.p.dbias.ptr) add_dbias(ds);
    if (has<Modification::kSoftcap>())
      for_pairs([&](int half, int j) { ds.v[half][j] *= cap_slope.v[half][j]; });
    if (!all_see_) clear_invisible(p, ds);  // slopes may be NaN, too
    out_.store(p.v, ds.v);
    out_ = out_.row(1);
    s_ += kUnitKeys;
    ++lse_;
    ++row_;
    random_ += random_ld_;
    --left_;
  }

 private:
  struct Pairs {
    Vec v[2][2];  // [row, its partner][keys, their partners]
  };
  template <class F>
  FLASH_INLINE static void for_pairs(F f) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) f(half, j);
  }
  template <Modification kWhich>
  FLASH_INLINE bool has() const {
    constexpr auto kBit = static_cast<unsigned>(kWhich);
    if constexpr (kKnown != 0) return (kKnown & kBit) != 0;
    return (modifications_ & kBit) != 0;
  }

  FLASH_INLINE Vec product(int half, int j, int offset = 0) const {
    return load(s_ + offset + half * kHalf * kUnitKeys + j * kHalf);
  }
  FLASH_INLINE Vec lse(int half) const { return set1(lse_[half * kHalf]); }
  FLASH_INLINE Vec begin(Vec v, float factor, int half) const {
    return kNatural ? v * factor : fma(v, set1(factor), lse(half));
  }
  FLASH_INLINE Vec delta(int half) const {
    return set1(lse_[half * kHalf + WeightsOutput<kTerms>::kRows]);
  }

  FLASH_INLINE void add_alibi(Pairs& x) const {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const Row& row = row_[half * kHalf];
      const Vec slope = plain_nan(set1(row.alibi_slope)) * -kUnits;
      const Vec distance = to_float(iota() + (first_key_ - ctx_.map.diagonal(row)));
      x.v[half][0] = fma(slope, abs(distance), x.v[half][0]);
      x.v[half][1] = fma(slope, abs(distance + static_cast<float>(kHalf)), x.v[half][1]);
    }
  }
  template <Dtype T>
  FLASH_INLINE void add_bias(Pairs& x) const {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      if (half * kHalf >= left_) return;  // beyond the last row
      const char* row = row_[half * kHalf].bias + int64_t{first_key_} * dtype_bytes(T);
      for (int i = 0; i < kUnitKeys * dtype_bytes(T); i += 64)  // of the next unit
        __builtin_prefetch(row + kUnitKeys * dtype_bytes(T) + i, 0, 2);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        Vec bias = load_as_float<T>(row, j * kHalf);
        if constexpr (T == Dtype::kFloat32) bias = plain_nan(bias);
        x.v[half][j] = fma(bias, set1(kUnits), x.v[half][j]);
      }
    }
  }
  FLASH_INLINE void clear_invisible(Pairs& p, Pairs& ds) const {
    for_pairs([&](int half, int j) {
      const KeyRange keys = row_[half * kHalf].keys;
      const VecI key = iota() + (first_key_ + j * kHalf);
      const VecI seen = (key >= keys.begin) & (key < keys.end);
      p.v[half][j] = select(seen, p.v[half][j], zero());
      ds.v[half][j] = select(seen, ds.v[half][j], zero());
    });
  }
  void add_dbias(const Pairs& ds) const {
    alignas(64) float row_ds[kUnitKeys];
    for (int half = 0; half < 2 && half * kHalf < left_; ++half) {
      store(row_ds, ds.v[half][0]);
      store(row_ds + kHalf, ds.v[half][1]);
      ctx_.add_dbias(row_[half * kHalf], row_ds, {0, kUnitKeys, first_key_});
    }
  }

  const BwdContext& ctx_;
  const unsigned modifications_;
  WeightsOutput<kTerms> out_;
  const float *s_, *lse_;  // dP lies behind S, delta behind lse
  const Row* row_;
  const uint8_t* random_;
  const int64_t random_ld_;
  const int first_key_;
  int left_;  // rows of the unit
  const bool all_see_;
  const float factor_;           // products times it are scores in kUnits
  const float inverse_softcap_;  // and scores by softcap
  const float softcap_;          // in kUnits
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
