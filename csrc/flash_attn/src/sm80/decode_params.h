// What the decode kernels are given beside FwdParams.
#pragma once

#include "common/softmax.h"
#include "sm80/append_params.h"
#include "sm80/fwd_params.h"

namespace flash::sm80 {

// The host's plan of the launch. CTAs are numbered by sequence, key-value head, sharer of a tile
// and tile, the last one fastest.
struct DecodeLaunch : AttentionLaunch {
  int tiles;          // of kDecodeRows rows, of a sequence's key-value head
  int ctas_per_tile;  // that share its units
  int max_units;      // of a tile
  int num_splits;     // the caller's wish; 0: none
  FastDivide group;   // query heads for each key-value head
  bool v_within_k;    // V's rows are the first d_v columns of K's
  Dropout dropout;
  int new_rows;  // of a sequence that this launch appends: decode_append.h
  AppendPlan append;
  // Results of single units where several CTAs share a tile, [tile, unit, row]: row maxima and
  // sums, unnormalised outputs of the kernel's head_dim_v. Tiles count over the launch.
  RowState* unit_states;
  float* unit_outputs;
  int unit_rows;       // of a tile that are kept
  uint32_t* arrivals;  // [tile], 0 at first
};

static_assert(sizeof(FwdParams) + sizeof(DecodeLaunch) <= 4096);

}  // namespace flash::sm80
