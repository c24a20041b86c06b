// base/philox.h, several counters at a time.
#pragma once

#include "base/cpu/simd.h"

namespace flash::cpu::FLASH_ATTN_ISA {

typedef uint64_t VecU64 __attribute__((vector_size(kWidth * 4)));
inline constexpr int kCounters = kWidth / 2;

// Low halves of the lanes times m.
FLASH_INLINE VecU64 multiply_low_halves(VecU64 x, uint32_t m) {
#if defined(FLASH_ATTN_SIMD_AVX512)
  return reinterpret_cast<VecU64>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(x), _mm512_set1_epi64(m)));
#elif defined(FLASH_ATTN_SIMD_AVX2)
  return reinterpret_cast<VecU64>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(x), _mm256_set1_epi64x(m)));
#else
  return (x & 0xffffffffu) * static_cast<uint64_t>(m);
#endif
}

// Lanes x[0], y[0], x[1], y[1], ...: half kHalf of them.
template <int kHalf, int... kLane>
FLASH_INLINE VecU64 zip(VecU64 x, VecU64 y, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(x, y,
                                 (kHalf * kCounters / 2 + kLane / 2 + kLane % 2 * kCounters)...);
}
template <int kHalf>
FLASH_INLINE VecU64 zip(VecU64 x, VecU64 y) {
  return zip<kHalf>(x, y, std::make_integer_sequence<int, kCounters>{});
}

// philox_4x32_7 of the counters {first, first + 1, ...; c1; c2; c3}: 16 bytes each, one after the
// other, to `out`.
FLASH_INLINE void philox_4x32_7(uint64_t key, uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3,
                                void* out) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  VecU64 x0, x1 = VecU64{} + c1, x2 = VecU64{} + c2, x3 = VecU64{} + c3;
  for (int i = 0; i < kCounters; ++i) x0[i] = first + static_cast<uint32_t>(i);
  for (int round = 0; round < 7; ++round) {
    const VecU64 p0 = multiply_low_halves(x0, 0xD2511F53u);
    const VecU64 p1 = multiply_low_halves(x2, 0xCD9E8D57u);
    x0 = (p1 >> 32) ^ x1 ^ static_cast<uint64_t>(k0);
    x2 = (p0 >> 32) ^ x3 ^ static_cast<uint64_t>(k1);
    x1 = p1;  // of which the low half is used
    x3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const VecU64 low = (x0 & 0xffffffffu) | x1 << 32, high = (x2 & 0xffffffffu) | x3 << 32;
  const VecU64 halves[2] = {zip<0>(low, high), zip<1>(low, high)};
  std::memcpy(out, halves, sizeof(halves));
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
