// Binary floating-point formats by their definition, in double arithmetic.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/flash.h"

namespace flash_test {

struct FloatFormat {
  int exponent_bits, mantissa_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint32_t infinity() const { return ((1u << exponent_bits) - 1) << mantissa_bits; }
  uint32_t sign() const { return 1u << (exponent_bits + mantissa_bits); }

  // Rounds to nearest, ties to even; what exceeds the largest finite number by half a step is inf.
  uint32_t encode(double x) const {
    const uint32_t sign_bit = std::signbit(x) ? sign() : 0;
    if (std::isnan(x)) return sign_bit | infinity() | 1u << (mantissa_bits - 1);
    if (std::isinf(x)) return sign_bit | infinity();
    const int exponent = std::max(x == 0 ? 1 - bias() : std::ilogb(x), 1 - bias());
    const double steps = std::nearbyint(std::ldexp(std::fabs(x), mantissa_bits - exponent));
    const double code = steps + std::ldexp(exponent + bias() - 1, mantissa_bits);
    return sign_bit | static_cast<uint32_t>(std::min<double>(code, infinity()));
  }

  double decode(uint32_t code) const {
    const double s = code & sign() ? -1 : 1;
    const uint32_t magnitude = code & (sign() - 1);
    if (magnitude > infinity()) return std::numeric_limits<double>::quiet_NaN();
    if (magnitude == infinity()) return s * std::numeric_limits<double>::infinity();
    const int exponent = static_cast<int>(magnitude >> mantissa_bits);
    const uint32_t fraction = magnitude & ((1u << mantissa_bits) - 1);
    const uint32_t steps = exponent == 0 ? fraction : fraction | 1u << mantissa_bits;
    return s * std::ldexp(steps, std::max(exponent, 1) - bias() - mantissa_bits);
  }
};

inline constexpr FloatFormat kFp16{5, 10}, kBf16{8, 7}, kFp32Format{8, 23};

inline const FloatFormat& format_of(flash::Dtype t) {
  return t == flash::Dtype::kFloat16 ? kFp16 : t == flash::Dtype::kBFloat16 ? kBf16 : kFp32Format;
}

// |actual - expected| in units of the last place of `expected` rounded to fp32.
inline double ulps(float actual, double expected) {
  if (std::isnan(expected)) return std::isnan(actual) ? 0 : INFINITY;
  if (std::isinf(expected)) return actual == expected ? 0 : INFINITY;
  const int exponent = std::max(expected == 0 ? -126 : std::ilogb(expected), -126);
  return std::fabs(actual - expected) / std::ldexp(1., exponent - 23);
}

}  // namespace flash_test
