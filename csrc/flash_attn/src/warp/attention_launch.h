// What the host tells attention kernels of scores and of rows.
#pragma once

#include "base/fast_divide.h"
#include "base/index_tensors.h"

namespace flash {

inline constexpr float kLog2e = 1.4426950408889634f;

// What the plans of all attention kernels have.
struct AttentionLaunch {
  bool modifies_scores;  // softcap, ALiBi, bias: scores become natural logits
  float scale;           // of scores to natural logits, 1 if they are
  float scale_log2;      // times log2(e): exp is 2^x
  bool negate_q;         // softmax_scale < 0
  bool q_aligned, k_aligned, v_aligned, o_aligned;  // rows are chunks of 16 bytes
  FastDivide page_size;
  IndexBounds bounds;
};

}  // namespace flash
