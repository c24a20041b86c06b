// What the forward kernel is given.
#pragma once

#include "base/fast_divide.h"
#include "base/index_tensors.h"
#include "common/dropout.h"
#include "common/flash.h"
#include "common/tile_scheduler.h"

namespace flash::sm80 {

// The call's arguments, those parts of them that the kernel reads.
struct FwdParams : Operands, SequenceGeometry, ScoreParams, AppendParams {};

inline constexpr float kLog2e = 1.4426950408889634f;

// What the plans of all attention kernels have.
struct AttentionLaunch {
  bool modifies_scores;  // softcap, ALiBi, bias: scores become natural logits
  float scale;           // of scores to natural logits, 1 if they are
  float scale_log2;      // times log2(e): exp is 2^x
  bool negate_q;         // softmax_scale < 0
  bool q_aligned, k_aligned, v_aligned, o_aligned;  // rows are chunks of 16 bytes: load.h
  FastDivide page_size;
  IndexBounds bounds;
};

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
