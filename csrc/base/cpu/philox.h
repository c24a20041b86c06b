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

// The keys of each round.
struct PhiloxKeys {
  explicit PhiloxKeys(uint64_t key) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (auto& pair : keys) {
      pair[0] = k0;
      pair[1] = k1;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
  uint64_t keys[7][2];
};

// One number in the low half of each lane; what lies in the high halves is not defined.
struct PhiloxLanes {
  VecU64 x[4];
};

// philox_4x32_7 of the counters {first, first + 1, ...; c1; c2; c3}. The first round's second
// product and the second round's first are the same for all of them.
FLASH_INLINE PhiloxLanes philox_lanes(const PhiloxKeys& key, uint32_t first, uint32_t c1,
                                      uint32_t c2, uint32_t c3) {
  constexpr uint32_t kFactor0 = 0xD2511F53u, kFactor1 = 0xCD9E8D57u;
  VecU64 counter = VecU64{} + first;
  for (int i = 0; i < kCounters; ++i) counter[i] += static_cast<uint64_t>(i);
  const uint64_t p1 = uint64_t{kFactor1} * c2;
  const uint64_t a0 = static_cast<uint32_t>((p1 >> 32) ^ c1 ^ key.keys[0][0]);
  const VecU64 p0 = multiply_low_halves(counter, kFactor0);
  const uint64_t q0 = a0 * kFactor0;
  const VecU64 q1 = multiply_low_halves((p0 >> 32) ^ (c3 ^ key.keys[0][1]), kFactor1);
  VecU64 x0 = (q1 >> 32) ^ (p1 ^ key.keys[1][0]), x1 = q1;
  VecU64 x2 = p0 ^ ((q0 >> 32) ^ key.keys[1][1]), x3 = VecU64{} + q0;
#pragma GCC unroll 5
  for (int round = 2; round < 7; ++round) {
    const VecU64 r0 = multiply_low_halves(x0, kFactor0), r1 = multiply_low_halves(x2, kFactor1);
    x0 = (r1 >> 32) ^ x1 ^ key.keys[round][0];
    x2 = (r0 >> 32) ^ x3 ^ key.keys[round][1];
    x1 = r1;
    x3 = r0;
  }
  return {{x0, x1, x2, x3}};
}

// The same: 16 bytes each, one after the other, to `out`.
FLASH_INLINE void philox_4x32_7(const PhiloxKeys& key, uint32_t first, uint32_t c1, uint32_t c2,
                                uint32_t c3, void* out) {
  const PhiloxLanes r = philox_lanes(key, first, c1, c2, c3);
  const VecU64 low = (r.x[0] & 0xffffffffu) | r.x[1] << 32;
  const VecU64 high = (r.x[2] & 0xffffffffu) | r.x[3] << 32;
  const VecU64 halves[2] = {zip<0>(low, high), zip<1>(low, high)};
  std::memcpy(out, halves, sizeof(halves));
}
FLASH_INLINE void philox_4x32_7(uint64_t key, uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3,
                                void* out) {
  philox_4x32_7(PhiloxKeys(key), first, c1, c2, c3, out);
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
