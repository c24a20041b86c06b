// What the forward kernel is given.
#pragma once

#include "common/flash.h"
#include "common/tile_scheduler.h"

namespace flash::sm80 {

// The call's arguments, those parts of them that the kernel reads.
struct FwdParams : Operands, SequenceGeometry, ScoreParams {};

// The host's plan of the launch.
struct FwdLaunch {
  Tile_scheduler scheduler;
  int heads;         // query heads
  int group;         // query heads for each key-value head
  float scale;       // |softmax_scale|; at least the smallest normal, so that -inf stays -inf
  float scale_log2;  // times log2(e): exp is 2^x
  bool negate_q;     // softmax_scale < 0
};

// The limit of CUDA C++ Programming Guide, "Function Parameters", up to compute capability 6; 32 KB
// from 7.0 and CUDA 12.1 on.
static_assert(sizeof(FwdParams) + sizeof(FwdLaunch) <= 4096);

}  // namespace flash::sm80
