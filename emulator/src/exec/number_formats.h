#pragma once

// Small floating formats and f32, one value at a time; for handlers outside the hot loops.

#include <cstdint>

namespace gpu_emulator::exec {

enum class Rounding : uint8_t { kNearest, kZero, kDown, kUp };

float flushed(float x);  // .ftz: a subnormal number becomes zero of its sign

float f16_to_float(uint32_t bits);
float bf16_to_float(uint32_t bits);
float e4m3_to_float(uint32_t bits);
float e5m2_to_float(uint32_t bits);

// A binary floating format of at most 32 bits.
struct SmallFormat {
  int exponent_bits, mantissa_bits;
  bool has_infinity;  // e4m3 has none; its only NaN is all ones
};
inline constexpr SmallFormat kF32Format = {8, 23, true};
inline constexpr SmallFormat kF16Format = {5, 10, true};
inline constexpr SmallFormat kBf16Format = {8, 7, true};
inline constexpr SmallFormat kTf32Format = {8, 10, true};  // in the upper 19 of 32 bits
inline constexpr SmallFormat kE4m3Format = {4, 3, false};
inline constexpr SmallFormat kE5m2Format = {5, 2, true};

struct RoundTo {
  Rounding rounding = Rounding::kNearest;
  bool away_from_ties = false;      // .rna
  bool saturate_to_finite = false;  // .satfinite: overflow and infinity give the largest number
};

// The bits of x in the format, right-aligned; subnormal results kept. NaN gives the canonical NaN
// (all ones but the sign).
uint32_t to_small(long double x, const SmallFormat& format, const RoundTo& how);

}  // namespace gpu_emulator::exec
