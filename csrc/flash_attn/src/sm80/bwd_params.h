// What the backward kernels are given.
#pragma once

#include "base/index_tensors.h"
#include "common/dropout.h"
#include "common/flash.h"
#include "common/tile_scheduler.h"

namespace flash::sm80 {

// The call's arguments, those parts of them that the kernels read.
struct BwdParams : Operands, SequenceGeometry, ScoreParams, GradientParams {};

// The host's plan of the main kernel's launch.
struct BwdLaunch {
  Tile_scheduler scheduler;  // key blocks, and key-value heads of all sequences
  int heads_k;
  int group;             // query heads for each key-value head
  bool modifies_scores;  // softcap, ALiBi, bias: scores become natural logits
  float scale;           // of scores to natural logits, 1 if they are
  float scale_log2;      // of scores to logits, times log2(e); may be negative
  bool q_aligned, k_aligned, v_aligned, dout_aligned;  // rows are chunks of 16 bytes: load.h
  bool dk_aligned, dv_aligned;
  bool dq_aligned;  // rows start at multiples of 4 bytes
  IndexBounds bounds;
  Dropout dropout;
  // dQ of blocks that several key blocks add to: fp32 sums, each warp's as its lanes hold them, and
  // how many have added, [query block, warp].
  float* dq_sums;
  uint32_t* turns;
  int q_blocks;  // of a head: of a sequence, or of a packed batch
};

static_assert(sizeof(BwdParams) + sizeof(BwdLaunch) <= 4096);

// Of the kernels before it and beside it.
struct BwdPrepareLaunch {
  int tiles;  // of kPrepareRows rows, of a head: of a sequence, or of a packed batch
  bool o_aligned, dout_aligned;
  IndexBounds bounds;
};
inline constexpr int kPrepareRows = 16;

}  // namespace flash::sm80
