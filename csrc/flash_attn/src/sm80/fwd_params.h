// What the forward kernel is given beside Flash_fwd_params: the host's plan of the launch.
#pragma once

#include "common/tile_scheduler.h"

namespace flash::sm80 {

struct FwdLaunch {
  Tile_scheduler scheduler;
  int heads;         // query heads
  int group;         // query heads for each key-value head
  float scale;       // |softmax_scale|; at least the smallest normal, so that -inf stays -inf
  float scale_log2;  // times log2(e): exp is 2^x
  bool negate_q;     // softmax_scale < 0
};

}  // namespace flash::sm80
