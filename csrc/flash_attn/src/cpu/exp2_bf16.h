// exp2 for weights that are rounded to bf16.
#pragma once

#include "base/cpu/vec_math.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// 2^x for x <= 127, relative error 3e-6, exact for integers. Results below 2^-126 are 0 or
// subnormal, 2^-inf = 0; NaN stays NaN. x = n + f with 0 <= f < 1; 2^f by a degree-4 minimax
// polynomial with p(0) = 1.
FLASH_INLINE Vec exp2_bf16(Vec x) {
#if defined(FLASH_ATTN_SIMD_AVX512)
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // 0 for -inf
#else
  x = max(set1(-127.f), x);
  const VecI towards_zero = __builtin_convertvector(x, VecI);
  const VecI n = towards_zero + (to_float(towards_zero) > x);  // a true comparison is -1
  const Vec f = x - to_float(n);
#endif
  Vec p = set1(1.3426686e-2f);
  p = fma(p, f, set1(5.2242471e-2f));
  p = fma(p, f, set1(2.4128021e-1f));
  p = fma(p, f, set1(6.9304484e-1f));
  p = fma(p, f, set1(1.0f));
#if defined(FLASH_ATTN_SIMD_AVX512)
  return _mm512_scalef_ps(p, x);  // p 2^floor(x)
#else
  return p * from_bits(reinterpret_cast<VecU>(n + 127) << 23);
#endif
}

FLASH_INLINE bool any_greater(Vec v, float bound) {
#if defined(FLASH_ATTN_SIMD_AVX512)
  return _mm512_cmp_ps_mask(v, set1(bound), _CMP_GT_OQ) != 0;
#else
  return reduce_max(v) > bound;
#endif
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
