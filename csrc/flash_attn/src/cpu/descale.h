// The factors of fp8 operands, of one key-value head of one sequence. Numbers are multiplied by
// them where they are read to fp32; where products take them as they are (decode.h, fwd_tiles.h),
// scores and weights are, one factor for all rows or one for each kDescaleRows of them.
#pragma once

#include "base/cpu/vec_math.h"
#include "common/seqlen.h"

namespace flash::cpu::FLASH_ATTN_ISA {

class RowFactors {
 public:
  RowFactors(const Descale& x, int64_t batch, int64_t head_k)
      : first_(x.ptr ? x.ptr + batch * x.batch_stride + head_k * x.head_stride : nullptr),
        block_stride_(x.block_stride) {}

  bool differ() const { return block_stride_ != 0; }  // from row to row
  // Of a row of the sequence; left padding counts.
  float of(int64_t row) const { return first_ ? first_[row / kDescaleRows * block_stride_] : 1.f; }
  // What all rows share: 1 where they differ.
  float shared() const { return first_ && !differ() ? *first_ : 1.f; }

 private:
  const float* first_;
  int64_t block_stride_;
};

struct HeadFactors {
  HeadFactors(const QuantizationParams& p, const Sequence& seq, int64_t head_k)
      : q(p.q_descale, seq.batch, head_k),
        k(p.k_descale, seq.batch, head_k),
        v(p.v_descale, seq.batch, head_k),
        leftpad(seq.leftpad) {}

  float of_k(int64_t key) const { return k.of(leftpad + key); }
  float of_v(int64_t key) const { return v.of(leftpad + key); }
  // Of products, where neither q's nor k's differ.
  float of_scores() const { return q.shared() * k.shared(); }

  const RowFactors q, k, v;
  const int64_t leftpad;
};

// The factors of `count` keys from `key` on, of which those from `keys` on have none.
template <class Factor>  // Factor(key) -> float
inline void fill_factors(float* factors, int64_t key, int keys, int count, Factor factor) {
  for (int j = 0; j < count; ++j) factors[j] = j < keys ? factor(key + j) : 1.f;
}
// x[j] *= factors[j] for j < count, a multiple of kWidth; what is 0 stays 0 beside a factor that is
// not finite.
inline void multiply_columns(float* x, const float* factors, int count) {
  for (int j = 0; j < count; j += kWidth) {
    const Vec v = load(x + j);
    store(x + j, select(v == zero(), v, v * load(factors + j)));
  }
}

// The outputs of a row, of width `count`, by V's factor; `sum` is of the row's weights. A row that
// sees no key stays 0 beside a factor that is not finite.
inline void multiply_output(float* o, float factor, float sum, int64_t count) {
  if (factor == 1.f || sum == 0.f) return;
  for (int64_t i = 0; i < count; i += kWidth) store(o + i, load(o + i) * factor);
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
