// exp2 for weights that are rounded to one or two terms of bf16.
#pragma once

#include "base/cpu/vec_math.h"

namespace flash::cpu::FLASH_ATTN_ISA {

#if defined(FLASH_ATTN_SIMD_AVX512)
inline constexpr int kPowers = 32;
alignas(64) inline constexpr float kPowersOf2[kPowers] = {  // 2^(i / 32)
    0x1p+0f,        0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f,
    0x1.2387a6p+0f, 0x1.29e9ep+0f,  0x1.306fep+0f,  0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f,
    0x1.4bfdaep+0f, 0x1.5342b6p+0f, 0x1.5ab07ep+0f, 0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f,
    0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f, 0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f,
    0x1.ae89fap+0f, 0x1.b7f77p+0f,  0x1.c199bep+0f, 0x1.cb720ep+0f, 0x1.d5818ep+0f, 0x1.dfc974p+0f,
    0x1.ea4afap+0f, 0x1.f50766p+0f};
#endif

// 2^x, relative error 2e-7, exact for integers; inf from 128 on. Results below 2^-126 are 0 or
// subnormal, 2^-inf = 0; NaN stays NaN. With AVX-512 x = n + i / 32 + f with 0 <= f < 1 / 32; 2^f
// by a degree-2 minimax polynomial with p(0) = 1 (relative error 7e-8): beside a tile unit, and
// alone, looking 2^(i / 32) up takes less time than two more degrees would, and four would be as
// accurate.
template <bool kNormal = false>  // 0 instead of subnormal results
FLASH_INLINE Vec exp2_bf16(Vec x) {
#if defined(FLASH_ATTN_SIMD_AVX512)
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const Vec f = _mm512_reduce_ps(x, 5 << 4 | kDown);  // steps of 2^-5; 0 for -inf
  // Adding it rounds to such steps, whose number then lies in the low mantissa bits.
  const Vec steps = _mm512_add_round_ps(x, set1(0x1.8p18f), kDown);
  const Vec power =
      _mm512_permutex2var_ps(load(kPowersOf2), _mm512_castps_si512(steps), load(kPowersOf2 + 16));
  const Vec p = fma(fma(set1(0.2426557f), f, set1(0.69312364f)), f * power, power);
  if constexpr (kNormal)
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set1(-126.f), _CMP_NLT_UQ), p, x);
  else
    return _mm512_scalef_ps(p, x);  // p 2^floor(x)
#else
  x = min(set1(128.f), x);
  return kNormal ? select(x < -126.f, zero(), exp2(x)) : exp2(x);
#endif
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
