// The order of keys in V of 8 bits, transposed.
#pragma once

#include "base/host_device.h"

namespace flash::hopper {

// Where a key of 16 goes among the columns of V transposed: so that P's registers, of two n8 tiles
// of scores whose lane t holds keys 2 t, 2 t + 1 and 2 t + 8, 2 t + 9, are A's as they are
// (fragments.h: accumulator_element, a_element_8_bits). Sums over keys take them in any order.
FLASH_INLINE constexpr int column_of_key(int key) {
  return key / 2 % 4 * 4 + key / 8 * 2 + key % 2;
}

}  // namespace flash::hopper
