// A loop whose counter is a constant in its body.
#pragma once

#include <utility>

#include "base/host_device.h"

namespace flash {

// std::integral_constant for device code too.
template <int kValue>
struct Constant {
  FLASH_INLINE constexpr operator int() const {
    return kValue;
  }  // NOLINT(google-explicit-constructor)
};

template <typename Body, int... kI>
FLASH_INLINE void static_for(const Body& body, std::integer_sequence<int, kI...>) {
  (body(Constant<kI>{}), ...);
}

// Calls body(Constant<i>{}) for i = 0 .. kCount - 1.
template <int kCount, typename Body>
FLASH_INLINE void static_for(const Body& body) {
  static_for(body, std::make_integer_sequence<int, kCount>{});
}

}  // namespace flash
