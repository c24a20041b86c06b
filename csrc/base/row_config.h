// Kernels that work row by row: attention's append, combine and dmask, and the fused operators.
#pragma once

#include "base/dtype.h"

namespace flash {

struct RowConfig {
  Dtype dtype;

  constexpr bool operator==(const RowConfig&) const = default;

  static consteval int threads() { return 128; }
  static consteval int ctas_per_sm() { return 8; }
};

}  // namespace flash
