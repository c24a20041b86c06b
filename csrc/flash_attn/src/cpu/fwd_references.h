// The references of the forward's exponents on bf16 tiles, a row's at a time: set, and raised when
// a score exceeds them by far.
#pragma once

#include "cpu/fwd_tiles_scratch.h"
#include "cpu/fwd_weights.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr float kMaxFused = 1024.f;  // of references subtracted by the FMA that scales

class FwdReferences {
 public:
  // scale: from products (or scores, where modified) to scores. may_fuse: references of any row may
  // be subtracted by the FMA.
  FwdReferences(const TaskContext<Flash_fwd_params>& ctx, const FwdTilesScratch& x, float scale,
                bool may_fuse)
      : ctx_(ctx),
        x_(x),
        may_fuse_(may_fuse),
        scale_(scale),
        factor_(scale * kLog2e),
        natural_(static_cast<double>(scale) / factor_) {}

  // From scores to units of log2.
  float factor() const { return factor_; }

  void set(int r, float largest) const {
    const float exponent = largest * factor_;
    const bool fused = may_fuse_ && -kMaxFused <= exponent && exponent <= kMaxFused;
    x_.reference[r] = fused ? -exponent : 0.f;
    x_.shift[r] = fused ? 0.f : largest;
    x_.largest[r] = largest;
    x_.state[r].max = fused ? static_cast<float>(exponent * natural_) : largest * scale_;
    if (!fused) x_.block(r).far = true;
  }
  // How much ALiBi lets the scores of row r grow from `key` on: references are that much higher, or
  // every piece would raise them again. A sum stays above e^-kMostGrowth.
  float growth(int r, int key) const {
    constexpr float kMostGrowth = 64.f;
    const Row& row = x_.rows[r];
    if (!(row.alibi_slope > 0.f)) return 0.f;
    const int diagonal = ctx_.map.diagonal(row), last = row.keys.end - 1;
    const float growth =
        row.alibi_slope * static_cast<float>((diagonal < last ? diagonal : last) - key);
    return growth < 0.f ? 0.f : growth < kMostGrowth ? growth : kMostGrowth;
  }
  // If a score of row r exceeds the reference of its exponents by far, it and what it may grow by
  // become the reference; O and the sum are scaled accordingly.
  void raise(int r, float largest, float growth) const {
    if (!((largest - x_.largest[r]) * factor_ > kMaxExponent - 1)) return;
    const bool is_first = x_.largest[r] == -kInf;
    const double before = exponent_of_reference(r);
    set(r, largest + growth);
    if (is_first) return;
    const float scale = exp2(static_cast<float>(before - exponent_of_reference(r)));
    float* sum = x_.sums_of(r, x_.block(r).sums);
    store(sum, load(sum) * scale);
    float* o = x_.o + int64_t{r} * ctx_.d_v_pad;
    for (int i = 0; i < ctx_.d_v_pad; i += kWidth) store(o + i, load(o + i) * scale);
  }

 private:
  // The reference of row r in units of log2, exact.
  double exponent_of_reference(int r) const {
    return x_.shift[r] != 0.f ? static_cast<double>(x_.shift[r]) * factor_
                              : -static_cast<double>(x_.reference[r]);
  }
  const TaskContext<Flash_fwd_params>& ctx_;
  const FwdTilesScratch& x_;
  const bool may_fuse_;
  const float scale_, factor_;
  const double natural_;  // from units of log2 to scores
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
