// What the forward kernel is given.
#pragma once

#include "common/dropout.h"
#include "common/flash.h"
#include "common/tile_scheduler.h"
#include "warp/attention_launch.h"

namespace flash::sm80 {

// The call's arguments, those parts of them that the kernel reads.
struct FwdParams : Operands, SequenceGeometry, ScoreParams, AppendParams {};

// The host's plan of the launch.
struct FwdLaunch : AttentionLaunch {
  Tile_scheduler scheduler;  // heads of all sequences; of a packed batch see packed_tile.h
  int heads;                 // query heads
  int group;                 // query heads for each key-value head
  Dropout dropout;
};

// The limit of CUDA C++ Programming Guide, "Function Parameters", up to compute capability 6; 32 KB
// from 7.0 and CUDA 12.1 on.
static_assert(sizeof(FwdParams) + sizeof(FwdLaunch) <= 4096);

}  // namespace flash::sm80
