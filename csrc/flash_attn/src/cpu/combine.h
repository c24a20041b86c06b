// Merging attention over disjoint sets of keys by their log-sum-exp.
#pragma once

#include "base/cpu/parallel.h"
#include "base/cpu/rows.h"
#include "base/cpu/scratch.h"
#include "common/softmax.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline void combine_row(const Combine_params& p, int64_t b, int64_t s, int64_t h, float* o) {
  const auto lse_of = [&](int64_t split) {
    const float lse = p.lse_partial[split * p.lse_partial_stride[0] + b * p.lse_partial_stride[1] +
                                    s * p.lse_partial_stride[2] + h * p.lse_partial_stride[3]];
    return lse == __builtin_inff() ? -lse : lse;  // the forward's mark of a row without keys
  };
  // The state of all parts at once, each a score of its own: the largest comes first.
  RowState state;
  for (int64_t i = 0; i < p.splits; ++i) state.max = lse_of(i) > state.max ? lse_of(i) : state.max;
  const int dv = static_cast<int>(p.d_v);
  std::memset(o, 0, dv * sizeof(float));
  for (int64_t i = 0; i < p.splits; ++i) {
    const float weight = exp(lse_of(i) - state.anchor());
    if (weight == 0.f) continue;  // an empty part may hold anything
    state.sum += weight;
    const float* part = p.out_partial + i * p.out_partial_stride[0] + b * p.out_partial_stride[1] +
                        s * p.out_partial_stride[2] + h * p.out_partial_stride[3];
    for (int j = 0; j < dv; ++j) o[j] += weight * part[j];
  }
  write_row(p.out_dtype, operand_row(p.out, p.out_dtype, b, s, h), o, dv, state.inverse_sum());
  if (p.lse)
    p.lse[b * p.lse_stride[0] + s * p.lse_stride[1] + h * p.lse_stride[2]] =
        state.sum == 0.f ? state.max : state.lse(1.f);
}

inline void combine(const Combine_params& p) {
  const int64_t rows = p.b * p.s * p.h;
  const int threads = threads_for(4.0 * rows * p.splits * p.d_v);
  Scratch scratch(threads * p.d_v * sizeof(float));
  parallel_for(rows, threads, [&](int64_t i, int thread) {
    float* o = reinterpret_cast<float*>(scratch.data()) + thread * p.d_v;
    combine_row(p, i / (p.s * p.h), i / p.h % p.s, i % p.h, o);
  });
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
