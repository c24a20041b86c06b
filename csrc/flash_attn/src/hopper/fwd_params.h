// What the forward kernel is given.
#pragma once

#include <cuda.h>

#include "common/dropout.h"
#include "common/flash.h"
#include "common/tile_scheduler.h"
#include "warp/attention_launch.h"

namespace flash::hopper {

// The call's arguments, those parts of them that the kernel reads.
struct FwdParams : Operands, SequenceGeometry, ScoreParams, AppendParams, QuantizationParams {};

// The host's plan of the launch.
struct FwdLaunch : AttentionLaunch {
  // Of the views in common/operand_views.h. A box is a group of columns of a tile of Q, of box_keys
  // rows of K or V, of a warpgroup's rows of O.
  CUtensorMap q, k, v, o;
  int box_keys;  // rows of a box of K and V: a CTA's share of a block, or a part of a page
  Tile_scheduler scheduler;  // heads of all sequences; of a packed batch see warp/packed_tile.h
  uint32_t* next_tile;       // tiles that have been taken beside the first of each CTA; null: CTAs
                             // take every gridDim-th
  int heads;                 // query heads
  int group;                 // query heads for each key-value head
  bool is_packed;            // q and out
  bool inspects_v;           // some blocks of V may hold what not every query sees
  bool rows_end_inside;      // K and V go on behind a sequence's last key
  Dropout dropout;
};

static_assert(sizeof(FwdParams) + sizeof(FwdLaunch) <= 4096);

}  // namespace flash::hopper
