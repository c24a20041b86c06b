// Division of row numbers by a divisor that a whole launch shares, without the division (Granlund
// and Montgomery, "Division by invariant integers using multiplication", PLDI 1994).
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace flash {

// n / divisor for 0 <= n < 2^31. With s = ceil(log2 divisor) the multiplier m = ceil(2^(31 + s) /
// divisor) has 32 bits, and n m >> (31 + s) is exact.
struct FastDivide {
  uint32_t multiplier = 1u << 31;
  int shift = 31;
  int divisor = 1;

  // divisor: 1..2^31 - 1.
  static constexpr FastDivide by(int divisor) {
    int bits = 0;
    while ((uint64_t{1} << bits) < static_cast<uint64_t>(divisor)) ++bits;
    const uint64_t power = uint64_t{1} << (31 + bits);
    return {static_cast<uint32_t>((power + divisor - 1) / divisor), 31 + bits, divisor};
  }

  FLASH_INLINE constexpr int quotient(int n) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier >> shift);
  }
};

}  // namespace flash
