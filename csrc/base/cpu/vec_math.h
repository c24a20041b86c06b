// exp, exp2 and tanh of a vector, accurate to about 1 ulp of fp32.
#pragma once

#include "base/cpu/simd.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// 2^x for x <= 128. Results below 2^-126.5 are 0, so 2^-inf = 0 exactly; NaN stays NaN.
// x = n + f with |f| <= 1/2; 2^f by a degree-6 minimax polynomial (relative error 2e-8), 2^n by the
// exponent field.
FLASH_INLINE Vec exp2(Vec x) {
  x = max(set1(-127.f), x);
  const Vec magic =
      set1(0x1.8p23f);  // adding it rounds to an integer, which then lies in the low mantissa bits
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p = set1(1.5461445e-4f);
  p = fma(p, f, set1(1.3400428e-3f));
  p = fma(p, f, set1(9.6180569e-3f));
  p = fma(p, f, set1(5.5503272e-2f));
  p = fma(p, f, set1(2.4022651e-1f));
  p = fma(p, f, set1(6.9314718e-1f));
  p = fma(p, f, set1(1.0f));
  const VecU n = bits(shifted) + 127u;
  return p * from_bits(n << 23);
}

FLASH_INLINE float exp2(float x) { return exp2(set1(x))[0]; }

// x - n ln 2 for whole |n| <= 128: an absolute error of 2e-9 |n| beside the last rounding.
FLASH_INLINE Vec minus_multiple_of_ln2(Vec x, Vec n) {
#if defined(FLASH_ATTN_SIMD_AVX512) || defined(FLASH_ATTN_SIMD_AVX2)
  return fma(n, set1(-kLn2), x);
#else
  return (x - n * 0.693359375f) - n * -2.12194440e-4f;  // the first product is exact
#endif
}

// e^x for x <= 88. Results below 2^-126.5 are 0, so e^-inf = 0 exactly; NaN stays NaN.
// x = n ln 2 + f with |f| <= ln(2) / 2; e^f by a degree-6 minimax polynomial (relative error 2e-9)
// with p(0) = 1, 2^n by the exponent field.
FLASH_INLINE Vec exp(Vec x) {
  x = max(set1(-127.f * kLn2), x);
  const Vec magic = set1(0x1.8p23f);
  const Vec shifted = fma(x, set1(kLog2e), magic);
  const Vec f = minus_multiple_of_ln2(x, shifted - magic);
  Vec p = set1(1.38436072e-3f);
  p = fma(p, f, set1(8.37419555e-3f));
  p = fma(p, f, set1(4.16680053e-2f));
  p = fma(p, f, set1(1.66664302e-1f));
  p = fma(p, f, set1(4.9999994e-1f));
  p = fma(p, f, set1(1.0f));
  p = fma(p, f, set1(1.0f));
  const VecU n = bits(shifted) + 127u;
  return p * from_bits(n << 23);
}

FLASH_INLINE float exp(float x) { return exp(set1(x))[0]; }

// tanh, after the two ranges of Cephes' tanhf (S. Moshier): an odd polynomial near 0, 1 - 2 /
// (e^2|y| + 1) beyond.
FLASH_INLINE Vec tanh(Vec y) {
  const Vec a = abs(y);
  const Vec z = y * y;
  Vec p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const Vec small = fma(p * z, y, y);
  const Vec capped = a > 10.f ? set1(10.f) : a;  // NaN stays NaN
  const Vec e = exp(capped * 2.f);
  const Vec large = 1.f - 2.f / (e + 1.f);
  const Vec signed_large = from_bits(bits(large) | (bits(y) & 0x80000000u));
  return select(a < 0.625f, small, signed_large);
}

struct TanhAndSlope {
  Vec value, slope;  // slope: 1 - tanh^2, accurate also where tanh is almost 1
};

// tanh(x / 2), relative error 2e-7, and its derivative with respect to x / 2; NaN stays NaN. Less
// work than tanh. With e = e^x, they are (e - 1) / (e + 1) and 4 e / (e + 1)^2. Near 0, e - 1 is
// accurate: x = n ln 2 + f as in exp, e^f - 1 = f + f^2 q(f) by a degree-4 minimax polynomial q.
FLASH_INLINE TanhAndSlope tanh_of_half(Vec x) {
  x = min(set1(40.f), max(set1(-40.f), x));
  const Vec magic = set1(0x1.8p23f);
  const Vec shifted = fma(x, set1(kLog2e), magic);
  const Vec f = minus_multiple_of_ln2(x, shifted - magic);
  Vec q = set1(1.38825097e-3f);
  q = fma(q, f, set1(8.36658012e-3f));
  q = fma(q, f, set1(4.16672006e-2f));
  q = fma(q, f, set1(1.66665435e-1f));
  q = fma(q, f, set1(4.9999997e-1f));
  q = fma(q, f * f, f);
  const Vec power = from_bits((bits(shifted) + 127u) << 23);
  const Vec e_minus_1 = fma(q, power, power - 1.f);
  const Vec r = reciprocal(e_minus_1 + 2.f);
  return {e_minus_1 * r, fma(q, power, power) * r * (4.f * r)};
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
