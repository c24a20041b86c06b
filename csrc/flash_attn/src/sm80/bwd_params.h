// What the backward kernels are given.
#pragma once

#include "common/dropout.h"
#include "common/flash.h"
#include "common/index_tensors.h"
#include "common/tile_scheduler.h"

namespace flash::sm80 {

// The call's arguments, those parts of them that the kernels read.
struct BwdParams : Operands, SequenceGeometry, ScoreParams, GradientParams {};

// The host's plan of the main kernel's launch.
struct BwdLaunch {
  Tile_scheduler scheduler;  // groups of key blocks, and key-value heads of all sequences
  int blocks_of_group;       // neighbouring CTAs: common/bwd_schedule.h
  int heads_k;
  int group;             // query heads for each key-value head
  bool modifies_scores;  // softcap, ALiBi, bias: scores become natural logits
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

// Of the kernel before it, which has kPrepareLanes for each row of softmax_d.
inline constexpr int kPrepareLanes = 8;
struct BwdPrepareLaunch {
  int64_t rows;   // of a head of softmax_d, with those between sequences
  int64_t heads;  // dense: of all sequences
  bool o_aligned, dout_aligned;
  IndexBounds bounds;
};

}  // namespace flash::sm80
