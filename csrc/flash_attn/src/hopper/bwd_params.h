// What the main kernel of the backward is given.
#pragma once

#include <cuda.h>

#include "warp/bwd_params.h"

namespace flash::hopper {

// The host's plan of the launch.
struct BwdLaunch : BwdScale, BwdTiles {
  // Of the views in common/operand_views.h. A box is a group of columns of all rows of a tile.
  CUtensorMap q, k, v, dout;
  bool is_packed;
  bool dk_aligned, dv_aligned;  // rows are chunks of 16 bytes
  bool dq_aligned;              // rows start at multiples of 4 bytes
};

static_assert(sizeof(BwdParams) + sizeof(BwdLaunch) <= 4096);

}  // namespace flash::hopper
