// Philox-4x32-7, a random number generator that is a pure function of a key and a counter (Salmon
// et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace flash {

struct Philox4 {
  uint32_t x[4];
};

// Both halves of the product of 32-bit numbers.
struct WideProduct {
  uint32_t low, high;
};

struct MultiplyWide {
  FLASH_INLINE WideProduct operator()(uint32_t a, uint32_t b) const {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    return {static_cast<uint32_t>(product), static_cast<uint32_t>(product >> 32)};
  }
};

// `multiply`: the machine's own way to both halves of a product.
template <class Multiply = MultiplyWide>
FLASH_INLINE Philox4 philox_4x32_7(uint64_t key, Philox4 counter, const Multiply& multiply = {}) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  Philox4 c = counter;
  for (int round = 0; round < 7; ++round) {
    const WideProduct p0 = multiply(0xD2511F53u, c.x[0]), p1 = multiply(0xCD9E8D57u, c.x[2]);
    c = {{p1.high ^ c.x[1] ^ k0, p1.low, p0.high ^ c.x[3] ^ k1, p0.low}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace flash
