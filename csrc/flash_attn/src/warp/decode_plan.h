// What the plans of all decode kernels have.
#pragma once

#include <cstdint>

#include "base/fast_divide.h"
#include "common/softmax.h"
#include "warp/attention_launch.h"

namespace flash {

// The host's plan of the launch. CTAs are numbered by sequence, key-value head, sharer of a tile
// and tile, the last one fastest.
struct DecodePlan : AttentionLaunch {
  int tiles;          // of a kernel's rows, of a sequence's key-value head
  int ctas_per_tile;  // that share its units
  int max_units;      // of a tile
  int num_splits;     // the caller's wish; 0: none
  FastDivide group;   // query heads for each key-value head
  // In the workspace, where several CTAs share a tile: the results of single units, row maxima and
  // sums, unnormalised outputs, which each kernel lays out for itself.
  RowState* unit_states;
  float* unit_outputs;
  uint32_t* arrivals;  // [tile], counted over the launch; 0 at first
};

}  // namespace flash
