// exp2 for weights that are rounded to one or two terms of bf16.
#pragma once

#include "base/cpu/vec_math.h"

namespace flash::cpu::FLASH_ATTN_ISA {

#if defined(FLASH_ATTN_SIMD_AVX512)
// What to add to (32 n + i) 2^18 for the bits of 2^(n + i / 32): those of 2^(i / 32) less i 2^18.
struct Powers {
  static constexpr int kCount = 32;
  static constexpr float kPowers[kCount] = {
      0x1p+0f,        0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f,
      0x1.1d4874p+0f, 0x1.2387a6p+0f, 0x1.29e9ep+0f,  0x1.306fep+0f,  0x1.371a74p+0f,
      0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f, 0x1.5ab07ep+0f,
      0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f,
      0x1.8ace54p+0f, 0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f, 0x1.ae89fap+0f,
      0x1.b7f77p+0f,  0x1.c199bep+0f, 0x1.cb720ep+0f, 0x1.d5818ep+0f, 0x1.dfc974p+0f,
      0x1.ea4afap+0f, 0x1.f50766p+0f};
  uint32_t bits[kCount];
  constexpr Powers() : bits{} {
    for (uint32_t i = 0; i < kCount; ++i)
      bits[i] = __builtin_bit_cast(uint32_t, kPowers[i]) - (i << 18);
  }
};
alignas(64) inline constexpr Powers kPowers;
#endif

// 2^x for x < 128, relative error 2e-7, exact for integers. 2^-inf = 0; NaN stays NaN. Results
// below 2^-126 are 0 or subnormal and wrong by less than 2^-126.
//
// With AVX-512 x = n + i / 32 + f with 0 <= f < 1 / 32; 2^f by a degree-2 minimax polynomial with
// p(0) = 1 (relative error 7e-8), 2^(i / 32) by a table in two registers, 2^n by adding integers:
// five operations on floating-point numbers (fwd_weights.h says why they count) and four on
// integers.
FLASH_INLINE Vec exp2_bf16(Vec x) {
#if defined(FLASH_ATTN_SIMD_AVX512)
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  constexpr float kRounds = 0x1.8p18f;  // adding it leaves 32 n + i in the low mantissa bits
  const Vec f = _mm512_reduce_ps(x, 5 << 4 | kDown);  // 0 for -inf
  VecI steps = reinterpret_cast<VecI>(Vec(_mm512_add_round_ps(x, set1(kRounds), kDown)));
  steps = max(steps, reinterpret_cast<VecI>(set1(kRounds - 127.f)));  // where 2^n becomes 0
  const VecI table = reinterpret_cast<VecI>(
      _mm512_permutex2var_epi32(_mm512_load_si512(kPowers.bits), reinterpret_cast<__m512i>(steps),
                                _mm512_load_si512(kPowers.bits + kWidth)));
  const Vec power = reinterpret_cast<Vec>(table + (steps << 18));
  return fma(fma(set1(0.2426557f), f, set1(0.69312364f)), f * power, power);
#else
  return exp2(x);
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
