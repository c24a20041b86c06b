// Kernels beside attention, that work row by row: append, combine, dmask.
#pragma once

#include "base/dtype.h"

namespace flash::sm80 {

struct RowConfig {
  Dtype dtype;

  constexpr bool operator==(const RowConfig&) const = default;

  static consteval int threads() { return 128; }
  static consteval int ctas_per_sm() { return 8; }
};

}  // namespace flash::sm80
