// What the main kernel of the backward is given.
#pragma once

#include "common/dropout.h"
#include "warp/bwd_params.h"

namespace flash::sm80 {

// The host's plan of the main kernel's launch.
struct BwdLaunch : BwdScale, BwdTiles {
  bool q_aligned, k_aligned, v_aligned, dout_aligned;  // rows are chunks of 16 bytes: load.h
  bool dk_aligned, dv_aligned;
  bool dq_aligned;  // rows start at multiples of 4 bytes
  Dropout dropout;
};

static_assert(sizeof(BwdParams) + sizeof(BwdLaunch) <= 4096);

}  // namespace flash::sm80
