#include "number_formats.h"

#include <bit>
#include <cmath>

namespace gpu_emulator::exec {
namespace {

float from_small(uint32_t bits, const SmallFormat& format) {
  const int mantissa_bits = format.mantissa_bits;
  const uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = static_cast<int>(bits >> mantissa_bits & ((1u << format.exponent_bits) - 1));
  const int top = (1 << format.exponent_bits) - 1;
  const bool negative = bits >> (format.exponent_bits + mantissa_bits) & 1;
  const int bias = (1 << (format.exponent_bits - 1)) - 1;
  float value;
  if (format.has_infinity && exponent == top) {
    value = mantissa ? NAN : INFINITY;
  } else if (!format.has_infinity && exponent == top && mantissa == (1u << mantissa_bits) - 1) {
    value = NAN;
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), 1 - bias - mantissa_bits);
  } else {
    value = std::ldexp(static_cast<float>(mantissa | 1u << mantissa_bits),
                       exponent - bias - mantissa_bits);
  }
  return negative ? -value : value;
}

// x >= 0 to an integer; kDown and kUp are directions of |x|.
long double rounded(long double x, const RoundTo& how) {
  const long double low = std::floor(x);
  const long double rest = x - low;
  switch (how.rounding) {
    case Rounding::kZero:
      return low;
    case Rounding::kDown:
      return low;
    case Rounding::kUp:
      return rest > 0 ? low + 1 : low;
    default:
      break;
  }
  if (rest != 0.5) return rest > 0.5 ? low + 1 : low;
  if (how.away_from_ties) return low + 1;
  return std::fmod(low, 2) == 0 ? low : low + 1;
}

}  // namespace

float f16_to_float(uint32_t bits) {
  _Float16 value;
  const auto low = static_cast<uint16_t>(bits);
  __builtin_memcpy(&value, &low, 2);
  return static_cast<float>(value);
}
float bf16_to_float(uint32_t bits) { return std::bit_cast<float>(bits << 16); }
float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
float e4m3_to_float(uint32_t bits) { return from_small(bits & 0xff, kE4m3Format); }
float e5m2_to_float(uint32_t bits) { return from_small(bits & 0xff, kE5m2Format); }

uint32_t to_small(long double x, const SmallFormat& format, const RoundTo& how) {
  const int mantissa_bits = format.mantissa_bits;
  const int sign_bit = format.exponent_bits + mantissa_bits;
  const int bias = (1 << (format.exponent_bits - 1)) - 1;
  const uint32_t all_ones = (1u << sign_bit) - 1;
  const uint32_t infinity = all_ones & ~((1u << mantissa_bits) - 1);
  const uint32_t largest = format.has_infinity ? infinity - 1 : all_ones - 1;
  if (std::isnan(x)) return all_ones;
  const uint32_t sign = std::signbit(x) ? 1u << sign_bit : 0;
  RoundTo magnitude_rounding = how;  // towards -inf grows a negative number's magnitude
  if (sign && how.rounding == Rounding::kDown) magnitude_rounding.rounding = Rounding::kUp;
  if (sign && how.rounding == Rounding::kUp) magnitude_rounding.rounding = Rounding::kDown;
  const long double magnitude = std::fabs(x);
  const uint32_t overflow = how.saturate_to_finite ? largest
                            : format.has_infinity  ? infinity
                                                   : all_ones;
  if (std::isinf(x)) return sign | overflow;
  if (magnitude == 0) return sign;
  int exponent = std::ilogb(magnitude);
  if (exponent < 1 - bias) exponent = 1 - bias;
  const long double scaled =
      rounded(std::ldexp(magnitude, mantissa_bits - exponent), magnitude_rounding);
  // The exponent field is 1 at 2^(1 - bias); the implicit bit, or a carry, adds the rest.
  const long double bits = scaled + std::ldexp(exponent + bias - 1.0L, mantissa_bits);
  if (bits <= largest) return sign | static_cast<uint32_t>(bits);
  const bool towards_zero = magnitude_rounding.rounding == Rounding::kZero ||
                            magnitude_rounding.rounding == Rounding::kDown;
  return sign | (towards_zero ? largest : overflow);
}

}  // namespace gpu_emulator::exec
