// What the kernels of the backward are given, whatever the device.
#pragma once

#include "base/index_tensors.h"
#include "common/far_rows.h"
#include "common/flash.h"
#include "common/seqlen.h"
#include "common/tile_scheduler.h"

namespace flash {

// The call's arguments, those parts of them that the kernels read.
struct BwdParams : Operands, SequenceGeometry, ScoreParams, GradientParams {};

// How products of q and k become logits.
struct BwdScale {
  bool modifies_scores;  // softcap, ALiBi, bias: scores become natural logits
  float scale;           // of scores to natural logits, 1 if they are
  float scale_log2;      // of scores to logits, times log2(e); may be negative
};

// In the workspace, [batch, head, query], of a packed batch [head, row]; those of rows with
// |softmax_lse| > kFarLse are written before others read them.
struct BwdReferences {
  RowReference* first;
  int64_t batch_stride, head_stride;

  FLASH_INLINE RowReference& at(const Sequence& seq, int head, int query) const {
    return first[seq.batch * batch_stride + head * head_stride + seq.lse_row + query];
  }
};

// What the main kernel's CTAs own, and where they sum up dQ.
struct BwdTiles {
  Tile_scheduler scheduler;  // key blocks, and key-value heads of all sequences
  int heads_k;
  int group;  // query heads for each key-value head
  IndexBounds bounds;
  BwdReferences references;
  // dQ of blocks that several key blocks add to: fp32 sums, as the lanes of its warps hold them,
  // and how many have added, [query block, part of it].
  float* dq_sums;
  uint32_t* turns;
  int q_blocks;  // of a head: of a sequence, or of a packed batch
};

// Of the kernels before it and beside it.
struct BwdPrepareLaunch : BwdScale {
  int tiles;  // of kPrepareRows rows, of a head: of a sequence, or of a packed batch
  int group;
  bool q_aligned, k_aligned, o_aligned, dout_aligned;
  IndexBounds bounds;
  BwdReferences references;
};
inline constexpr int kPrepareRows = 16;

}  // namespace flash
