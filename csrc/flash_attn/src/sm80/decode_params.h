// What the decode kernels are given beside FwdParams.
#pragma once

#include "sm80/append_params.h"
#include "sm80/fwd_params.h"
#include "warp/decode_plan.h"

namespace flash::sm80 {

// The host's plan of the launch, of tiles of kDecodeRows rows. Units' results, [tile, unit, row],
// have outputs of the kernel's head_dim_v.
struct DecodeLaunch : DecodePlan {
  bool v_within_k;  // V's rows are the first d_v columns of K's
  Dropout dropout;
  int new_rows;  // of a sequence that this launch appends: decode_append.h
  AppendPlan append;
  int unit_rows;  // of a tile that are kept
};

static_assert(sizeof(FwdParams) + sizeof(DecodeLaunch) <= 4096);

}  // namespace flash::sm80
