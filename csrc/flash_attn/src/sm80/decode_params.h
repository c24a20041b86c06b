// What the decode kernel is given beside FwdParams.
#pragma once

#include "common/softmax.h"
#include "sm80/fwd_params.h"

namespace flash::sm80 {

// The host's plan of the launch. CTAs are numbered by sequence, key-value head, sharer of a tile and
// tile, the last one fastest.
struct DecodeLaunch {
  int tiles;          // of kDecodeRows rows, of a sequence's key-value head
  int ctas_per_tile;  // that share its units
  int max_units;      // of a tile
  int num_splits;     // the caller's wish; 0: none
  FastDivide group;   // query heads for each key-value head
  bool modifies_scores;  // softcap, ALiBi: scores become natural logits
  float scale;           // of scores to natural logits, 1 if they are
  float scale_log2;      // times log2(e): exp is 2^x
  bool negate_q;         // softmax_scale < 0
  bool q_aligned, k_aligned, v_aligned, o_aligned;  // rows are chunks of 16 bytes: load.h
  FastDivide page_size;
  IndexBounds bounds;
  // Results of single units where several CTAs share a tile, [tile, unit, row]: row maxima and sums,
  // unnormalised outputs of the kernel's head_dim_v. Tiles count over the launch.
  RowState* unit_states;
  float* unit_outputs;
  int unit_rows;      // of a tile that are kept
  uint32_t* arrivals;  // [tile], 0 at first
};

static_assert(sizeof(FwdParams) + sizeof(DecodeLaunch) <= 4096);

}  // namespace flash::sm80
