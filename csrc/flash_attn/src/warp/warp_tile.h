// A warp's tile of scores and of the output, in registers.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "common/softmax.h"

namespace flash {

// Accumulators of a warp: m16 tile, n8 tile, register (fragments.h: accumulator_element). A lane
// holds two rows of each m16 tile, `half` 0 and 1: registers 2 half and 2 half + 1.
template <auto C>
struct WarpTile {
  static constexpr int kM = C.row_tiles();
  static constexpr int kS = C.warp_keys() / 8;
  static constexpr int kO = C.warp_columns() / 8;

  using Scores = float[kM][kS][4];
  // Packed pairs of Scores' registers; in 8 bits those of two neighbouring n8 tiles.
  static constexpr int kP = kS * dtype_bytes(C.dtype) / 2;
  using Probabilities = uint32_t[kM][kP][2];
  using Output = float[kM][kO][4];
  using Rows = RowState[kM][2];
};

}  // namespace flash
