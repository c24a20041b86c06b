// What the decode kernel is given beside FwdParams.
#pragma once

#include <cuda.h>

#include "hopper/fwd_params.h"
#include "warp/decode_plan.h"

namespace flash::hopper {

// The host's plan of the launch. Units' results in the workspace are as decode_merge.h has them.
struct DecodeLaunch : DecodePlan {
  // Of the views in common/operand_views.h. A box is a group of columns of box_keys rows.
  CUtensorMap k, v;
  int box_keys;    // of a slot of K or V; 0: rows are copied one by one, without the maps
  int kept_units;  // of a tile, in the workspace
  int kept_warps;  // of a warpgroup, that have rows
};

static_assert(sizeof(FwdParams) + sizeof(DecodeLaunch) <= 4096);

}  // namespace flash::hopper
