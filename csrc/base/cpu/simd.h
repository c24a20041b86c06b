// One vector type per instruction set, over the compiler's vector extension. A translation unit of
// the CPU backend defines FLASH_ATTN_ISA (its namespace) and FLASH_ATTN_VECTOR_WIDTH (floats a
// vector) before including anything.
//
// Everything an ISA unit compiles lives in its own namespace or is always inlined: an inline
// function emitted once with AVX-512 instructions and shared by the linker with the baseline would
// crash older machines.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/host_device.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr int kWidth = FLASH_ATTN_VECTOR_WIDTH;

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t VecI __attribute__((vector_size(kWidth * 4)));
typedef uint32_t VecU __attribute__((vector_size(kWidth * 4)));
typedef uint16_t VecU16 __attribute__((vector_size(kWidth * 2)));
typedef uint16_t VecU16x2 __attribute__((vector_size(kWidth * 4)));  // two of VecU16
typedef uint8_t VecU8 __attribute__((vector_size(kWidth)));

#if defined(__AVX512F__) && FLASH_ATTN_VECTOR_WIDTH == 16
#define FLASH_ATTN_SIMD_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && FLASH_ATTN_VECTOR_WIDTH == 8
#define FLASH_ATTN_SIMD_AVX2 1
#endif

FLASH_INLINE Vec set1(float x) { return x - Vec{}; }
FLASH_INLINE VecI set1i(int32_t x) { return x - VecI{}; }
FLASH_INLINE Vec zero() { return Vec{}; }

FLASH_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
FLASH_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

FLASH_INLINE VecU bits(Vec v) { return reinterpret_cast<VecU>(v); }
FLASH_INLINE Vec from_bits(VecU v) { return reinterpret_cast<Vec>(v); }

// a * b + c with one rounding where the ISA has it.
FLASH_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(FLASH_ATTN_SIMD_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(FLASH_ATTN_SIMD_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// The larger; the second operand if either is NaN.
FLASH_INLINE Vec max(Vec a, Vec b) {
#if defined(FLASH_ATTN_SIMD_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(FLASH_ATTN_SIMD_AVX2)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

FLASH_INLINE VecU max(VecU a, VecU b) { return a > b ? a : b; }

// The smaller; the second operand if either is NaN.
FLASH_INLINE Vec min(Vec a, Vec b) {
#if defined(FLASH_ATTN_SIMD_AVX512)
  return _mm512_min_ps(a, b);
#elif defined(FLASH_ATTN_SIMD_AVX2)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// Relative error 2^-23.
FLASH_INLINE Vec reciprocal(Vec v) {
#if defined(FLASH_ATTN_SIMD_AVX512)
  const Vec r = _mm512_rcp14_ps(v);
  return fma(r, fma(-v, r, set1(1.f)), r);
#else
  return 1.f / v;
#endif
}

FLASH_INLINE Vec abs(Vec v) { return from_bits(bits(v) & 0x7fffffffu); }
FLASH_INLINE Vec select(VecI mask, Vec yes, Vec no) { return mask ? yes : no; }
FLASH_INLINE Vec to_float(VecI v) { return __builtin_convertvector(v, Vec); }

// For masks as comparisons make them: lanes of 0 or -1.
FLASH_INLINE bool all_of(VecI mask) {
#if defined(FLASH_ATTN_SIMD_AVX512)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) == 0xffff;
#elif defined(FLASH_ATTN_SIMD_AVX2)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) == 0xff;
#else
  bool all = true;
  for (int i = 0; i < kWidth; ++i) all &= mask[i] != 0;
  return all;
#endif
}

FLASH_INLINE VecI load_bytes(const uint8_t* p) {
#if defined(FLASH_ATTN_SIMD_AVX512)
  return reinterpret_cast<VecI>(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(FLASH_ATTN_SIMD_AVX2)
  return reinterpret_cast<VecI>(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  VecU8 v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, VecI);
#endif
}

// 0, 1, 2, ...
FLASH_INLINE VecI iota() {
  VecI v;
  for (int i = 0; i < kWidth; ++i) v[i] = i;
  return v;
}

// Each lane's partner at a distance of kStep, a power of two.
template <int kStep, int... kLane>
FLASH_INLINE Vec partners(Vec v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ kStep)...);
}
template <int kStep>
FLASH_INLINE Vec partners(Vec v) {
  return partners<kStep>(v, std::make_integer_sequence<int, kWidth>{});
}

// Pairwise, so that the order of additions does not depend on the compiler.
template <int kStep = kWidth / 2>
FLASH_INLINE float reduce_add(Vec v) {
  v += partners<kStep>(v);
  if constexpr (kStep > 1) return reduce_add<kStep / 2>(v);
  return v[0];
}
template <int kStep = kWidth / 2>
FLASH_INLINE float reduce_max(Vec v) {
  v = max(v, partners<kStep>(v));
  if constexpr (kStep > 1) return reduce_max<kStep / 2>(v);
  return v[0];
}

// ----------------------------------------------------------------------------------------------
// 16-bit floats
FLASH_INLINE VecU16 load_u16(const uint16_t* p) {
  VecU16 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
FLASH_INLINE void store_u16(uint16_t* p, VecU16 v) { std::memcpy(p, &v, sizeof(v)); }

FLASH_INLINE VecU16x2 load_u16x2(const uint16_t* p) {
  VecU16x2 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
FLASH_INLINE void store_u16x2(uint16_t* p, VecU16x2 v) { std::memcpy(p, &v, sizeof(v)); }

// Lanes as pairs, those of `even` in the low bits.
FLASH_INLINE VecU pairs(VecU16 even, VecU16 odd) {
#if defined(FLASH_ATTN_SIMD_AVX512)
  const VecU index = (reinterpret_cast<VecU>(iota()) * 0x10001u) | 0x200000u;
  return reinterpret_cast<VecU>(_mm512_permutex2var_epi16(
      _mm512_castsi256_si512(reinterpret_cast<__m256i>(even)), reinterpret_cast<__m512i>(index),
      _mm512_castsi256_si512(reinterpret_cast<__m256i>(odd))));
#else
  return __builtin_convertvector(even, VecU) | __builtin_convertvector(odd, VecU) << 16;
#endif
}
// Lanes kFirst + i of both.
template <int kFirst, int... kLane>
FLASH_INLINE VecU pairs(VecU16x2 even, VecU16x2 odd, std::integer_sequence<int, kLane...>) {
  return reinterpret_cast<VecU>(
      __builtin_shufflevector(even, odd, (kFirst + kLane / 2 + kLane % 2 * 2 * kWidth)...));
}
template <int kFirst>
FLASH_INLINE VecU pairs(VecU16x2 even, VecU16x2 odd) {
  return pairs<kFirst>(even, odd, std::make_integer_sequence<int, 2 * kWidth>{});
}

FLASH_INLINE Vec bf16_to_float(VecU16 v) {
  return from_bits(__builtin_convertvector(v, VecU) << 16);
}

// Round to nearest even; NaN stays NaN.
FLASH_INLINE VecU16 float_to_bf16(Vec v) {
  const VecU u = bits(v);
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU nan = (u >> 16) | 0x40u;
  const VecI is_nan = v != v;
  return __builtin_convertvector(is_nan ? nan : rounded, VecU16);
}

FLASH_INLINE Vec fp16_to_float(VecU16 v) {
#if defined(FLASH_ATTN_SIMD_AVX512)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(v));
#elif defined(FLASH_ATTN_SIMD_AVX2)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(v));
#else
  const VecU h = __builtin_convertvector(v, VecU);
  const VecU magnitude = (h & 0x7fffu) << 13;
  // Multiplying by 2^112 rebiases the exponent and normalises subnormals; inf and NaN get the
  // all-ones exponent back.
  const Vec scaled = from_bits(magnitude) * 0x1p112f;
  const VecI special = reinterpret_cast<VecI>(magnitude) >= 0x0f800000;
  const VecU value = special ? (bits(scaled) | 0x7f800000u) : bits(scaled);
  return from_bits(value | ((h & 0x8000u) << 16));
#endif
}

// 8-bit floats with 4 bits of exponent (e4m3fn) as fp16 of 2^-8 their value: exponent and mantissa
// begin one bit lower than fp16's, behind the sign. What has all their bits set is NaN.
inline constexpr float kFp8OfFp16 = 0x1p8f;
inline constexpr uint16_t kFp8Sign = 0x8000, kFp8Magnitude = 0x3f80;  // in fp16's place

template <class Words>  // sign-extended bytes
FLASH_INLINE Words fp8_to_fp16_but_nan(Words v) {
  return v << 7 & static_cast<uint16_t>(kFp8Sign | kFp8Magnitude);
}
template <class Words>
FLASH_INLINE Words fp8_to_fp16(Words v) {
  const Words h = fp8_to_fp16_but_nan(v);
  return h | reinterpret_cast<Words>((h & kFp8Magnitude) == kFp8Magnitude);
}

FLASH_INLINE VecU16 load_fp8_words(const uint8_t* p) {
#if defined(FLASH_ATTN_SIMD_AVX2)  // gcc 12 has worse for 8 bytes
  return reinterpret_cast<VecU16>(
      _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  typedef int8_t Bytes __attribute__((vector_size(kWidth)));
  typedef int16_t Words __attribute__((vector_size(2 * kWidth)));
  Bytes v;
  std::memcpy(&v, p, sizeof(v));
  return reinterpret_cast<VecU16>(__builtin_convertvector(v, Words));
#endif
}
FLASH_INLINE VecU16x2 load_fp8_words_x2(const uint8_t* p) {
  typedef int8_t Bytes __attribute__((vector_size(2 * kWidth)));
  typedef int16_t Words __attribute__((vector_size(4 * kWidth)));
  Bytes v;
  std::memcpy(&v, p, sizeof(v));
  return reinterpret_cast<VecU16x2>(__builtin_convertvector(v, Words));
}

// Round to nearest even, overflow to inf; NaN stays NaN.
FLASH_INLINE VecU16 float_to_fp16(Vec v) {
#if defined(FLASH_ATTN_SIMD_AVX512)
  return reinterpret_cast<VecU16>(
      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(FLASH_ATTN_SIMD_AVX2)
  return reinterpret_cast<VecU16>(
      _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const VecU sign = bits(v) & 0x80000000u;
  const VecU u = bits(v) ^ sign;
  // Normal results: rebias and round the 13 dropped bits. Subnormal results: adding 0.5 lines the
  // bits up and rounds.
  const VecU normal = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
  const VecU subnormal = bits(from_bits(u) + 0.5f) - 0x3f000000u;
  const VecI is_subnormal = reinterpret_cast<VecI>(u) < 0x38800000;
  const VecI is_overflow = reinterpret_cast<VecI>(u) >= 0x477ff000;
  const VecI is_nan = reinterpret_cast<VecI>(u) > 0x7f800000;
  VecU h = is_subnormal ? subnormal : normal;
  h = is_overflow ? VecU{} + 0x7c00u : h;
  h = is_nan ? VecU{} + 0x7e00u : h;
  return __builtin_convertvector(h | (sign >> 16), VecU16);
#endif
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
