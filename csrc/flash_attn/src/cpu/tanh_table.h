// tanh for scores on their way into weights of one or two terms of bf16.
#pragma once

#include "base/cpu/vec_math.h"

namespace flash::cpu::FLASH_ATTN_ISA {

#if defined(FLASH_ATTN_SIMD_AVX512)
// tanh(i / 4 + t), |t| <= 1 / 8, is the polynomial of column i in t, row k its coefficients of t^k:
// minimax in the relative error, 4e-8.
inline constexpr int kTanhDegree = 5, kTanhSteps = 32;
inline constexpr float kTanhEnd = 0x1.f7p2f;  // short of the end of the last column
alignas(64) inline constexpr float kTanhTable[kTanhDegree + 1][kTanhSteps] = {
    {0.f,
     0x1.f597eap-3f,
     0x1.d9353ep-2f,
     0x1.45323ep-1f,
     0x1.85efacp-1f,
     0x1.b2523cp-1f,
     0x1.cf6f98p-1f,
     0x1.e1fbfap-1f,
     0x1.ed9506p-1f,
     0x1.f4bfd6p-1f,
     0x1.f92582p-1f,
     0x1.fbd50ap-1f,
     0x1.fd77d2p-1f,
     0x1.fe767ap-1f,
     0x1.ff112cp-1f,
     0x1.ff6f18p-1f,
     0x1.ffa818p-1f,
     0x1.ffcaacp-1f,
     0x1.ffdfa8p-1f,
     0x1.ffec62p-1f,
     0x1.fff41ap-1f,
     0x1.fff8c8p-1f,
     0x1.fffbap-1f,
     0x1.fffd58p-1f,
     0x1.fffe64p-1f,
     0x1.ffff06p-1f,
     0x1.ffff68p-1f,
     0x1.ffffa4p-1f,
     0x1.ffffc8p-1f,
     0x1.ffffdep-1f,
     0x1.ffffecp-1f,
     0x1.fffff4p-1f},
    {0x1p+0f,         0x1.e149a6p-1f,  0x1.92a94ap-1f,  0x1.3173b2p-1f,  0x1.ae0dcp-2f,
     0x1.1f2512p-2f,  0x1.721652p-3f,  0x1.d22ca2p-4f,  0x1.2162c2p-4f,  0x1.64108ap-5f,
     0x1.b3afe2p-6f,  0x1.09a7a6p-6f,  0x1.434a52p-7f,  0x1.88ef68p-8f,  0x1.dd37d2p-9f,
     0x1.21a7aep-9f,  0x1.5f85aep-10f, 0x1.aa87dp-11f,  0x1.02bec8p-11f, 0x1.39e782p-12f,
     0x1.7ccec2p-13f, 0x1.cdf5a4p-14f, 0x1.1832dcp-14f, 0x1.53e714p-15f, 0x1.9c5378p-16f,
     0x1.f42dep-17f,  0x1.2f5ffap-17f, 0x1.700356p-18f, 0x1.be6c4p-19f,  0x1.0ec4f2p-19f,
     0x1.4875bep-20f, 0x1.8e712ep-21f},
    {0x1.dd1dfp-22f,   -0x1.d77c86p-3f,  -0x1.742576p-2f,  -0x1.8403cap-2f,  -0x1.47877p-2f,
     -0x1.e72a2ep-3f,  -0x1.4efc5cp-3f,  -0x1.b6d8a4p-4f,  -0x1.16f9cep-4f,  -0x1.5c3d5ap-5f,
     -0x1.adda7cp-6f,  -0x1.077dbcp-6f,  -0x1.41b09cp-7f,  -0x1.87c0d6p-8f,  -0x1.dc5882p-9f,
     -0x1.215544p-9f,  -0x1.5f48c8p-10f, -0x1.aa5abap-11f, -0x1.02ae08p-11f, -0x1.39dafep-12f,
     -0x1.7cc55p-13f,  -0x1.cdee66p-14f, -0x1.183008p-14f, -0x1.53e4c8p-15f, -0x1.9c5186p-16f,
     -0x1.f42c22p-17f, -0x1.2f5f26p-17f, -0x1.70028p-18f,  -0x1.be6b5cp-19f, -0x1.0ec474p-19f,
     -0x1.48752cp-20f, -0x1.8e7086p-21f},
    {-0x1.555c3p-2f,  -0x1.07285ap-2f, -0x1.81f01p-4f,  0x1.56741p-5f,   0x1.a85e08p-4f,
     0x1.bba644p-4f,  0x1.67b366p-4f,  0x1.01baa4p-4f,  0x1.58f562p-5f,  0x1.bbccf2p-6f,
     0x1.16df28p-6f,  0x1.599734p-7f,  0x1.a8ac4p-8f,   0x1.039984p-8f,  0x1.3c6802p-9f,
     0x1.80ecaap-10f, 0x1.d3c042p-11f, 0x1.1c015p-11f,  0x1.58bc84p-12f, 0x1.a2595p-13f,
     0x1.fb9a38p-14f, 0x1.33eba2p-14f, 0x1.758f0ap-15f, 0x1.c52c6ap-16f, 0x1.12df54p-16f,
     0x1.4d7188p-17f, 0x1.947dfcp-18f, 0x1.eaad62p-19f, 0x1.299cb2p-19f, 0x1.6905cap-20f,
     0x1.b5f176p-21f, 0x1.09a05p-21f},
    {0x1.0d5174p-11f,  0x1.1ac736p-3f,   0x1.4ed9bap-3f,   0x1.987ad8p-4f,   0x1.cd4146p-6f,
     -0x1.90d224p-7f,  -0x1.9649e4p-6f,  -0x1.8093cap-6f,  -0x1.252f8ap-6f,  -0x1.94571p-7f,
     -0x1.0842aep-7f,  -0x1.4f123cp-8f,  -0x1.a15f58p-9f,  -0x1.013778p-9f,  -0x1.3b0958p-10f,
     -0x1.8063a2p-11f, -0x1.d3ef06p-12f, -0x1.1c6c3ap-12f, -0x1.597816p-13f, -0x1.a36778p-14f,
     -0x1.fd015p-15f,  -0x1.34d0fap-15f, -0x1.76adbep-16f, -0x1.c68e72p-17f, -0x1.13b85ep-17f,
     -0x1.4e7a84p-18f, -0x1.95c0ap-19f,  -0x1.ec35aap-20f, -0x1.2a8b16p-20f, -0x1.6a2734p-21f,
     -0x1.b7503ap-22f, -0x1.0a7556p-22f},
    {0x1.09ea1ep-3f,  0x1.2f579ap-4f,  -0x1.a451c6p-6f, -0x1.0397c6p-4f, -0x1.7b5f98p-5f,
     -0x1.3d7f88p-6f, -0x1.6e4fbap-9f, 0x1.dc3b74p-9f,  0x1.380418p-8f,  0x1.052f9cp-8f,
     0x1.76da54p-9f,  0x1.f3d13ap-10f, 0x1.404d9cp-10f, 0x1.916b5cp-11f, 0x1.f08838p-12f,
     0x1.30b6dap-12f, 0x1.74432cp-13f, 0x1.c58392p-14f, 0x1.13c8b2p-14f, 0x1.4f1188p-15f,
     0x1.96d85ap-16f, 0x1.edcfeap-17f, 0x1.2b9e2ep-17f, 0x1.6b8878p-18f, 0x1.b90ae2p-19f,
     0x1.0b870cp-19f, 0x1.448cd4p-20f, 0x1.89b3ecp-21f, 0x1.dd9706p-22f, 0x1.21afaap-22f,
     0x1.5f6e44p-23f, 0x1.aa4ef2p-24f}};
#endif

// tanh(x), relative error 3e-7 (1 - tanh of it) from kTanhEnd on, 1.3e-7 below; NaN stays NaN. With
// AVX-512 all coefficients are looked up, which takes a third of the floating-point operations of
// tanh_of_half: those are what is short beside a tile unit.
FLASH_INLINE Vec tanh_by_table(Vec x) {
#if defined(FLASH_ATTN_SIMD_AVX512)
  const Vec a = min(set1(kTanhEnd), abs(x));
  const Vec t = _mm512_reduce_ps(a, 2 << 4 | _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // Adding it rounds to quarters, whose number then lies in the low mantissa bits.
  const __m512i column = _mm512_castps_si512(a + 0x1.8p21f);
  const auto coefficients = [&](int k) __attribute__((always_inline)) -> Vec {
    return _mm512_permutex2var_ps(load(kTanhTable[k]), column, load(kTanhTable[k] + kWidth));
  };
  Vec y = coefficients(kTanhDegree);
#pragma GCC unroll 5
  for (int k = kTanhDegree - 1; k >= 0; --k) y = fma(y, t, coefficients(k));
  return from_bits(bits(y) | (bits(x) & 0x80000000u));
#else
  return tanh_of_half(x + x).value;
#endif
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
