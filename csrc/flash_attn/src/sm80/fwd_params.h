// What the forward kernel is given.
#pragma once

#include "common/dropout.h"
#include "common/fast_divide.h"
#include "common/flash.h"
#include "common/index_tensors.h"
#include "common/tile_scheduler.h"

namespace flash::sm80 {

// The call's arguments, those parts of them that the kernel reads.
struct FwdParams : Operands, SequenceGeometry, ScoreParams, AppendParams {};

// The host's plan of the launch.
struct FwdLaunch {
  Tile_scheduler scheduler;  // its heads are those of all sequences, then those of no sequence
  int heads;                 // query heads
  int group;                 // query heads for each key-value head
  bool modifies_scores;      // softcap, ALiBi, bias: scores become natural logits
  float scale;               // of scores to natural logits, 1 if they are
  float scale_log2;          // times log2(e): exp is 2^x
  bool negate_q;             // softmax_scale < 0
  bool q_aligned, k_aligned, v_aligned, o_aligned;  // rows are chunks of 16 bytes: load.h
  FastDivide page_size;
  Dropout dropout;
  IndexBounds bounds;
};

// The limit of CUDA C++ Programming Guide, "Function Parameters", up to compute capability 6; 32 KB
// from 7.0 and CUDA 12.1 on.
static_assert(sizeof(FwdParams) + sizeof(FwdLaunch) <= 4096);

}  // namespace flash::sm80
