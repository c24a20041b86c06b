// What the plans of all launches share.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/flash.h"
#include "sm80/launch.h"
#include "sm80/smem.h"

namespace flash::sm80 {

inline bool modifies_scores(const ScoreParams& p) {
  return p.softcap > 0.f || p.alibi_slopes != nullptr || p.bias.ptr != nullptr;
}

template <class Launch>
void plan_alignment(const Flash_fwd_params& p, Launch& launch) {
  launch.q_aligned = is_aligned(p.q, p.d);
  launch.k_aligned = is_aligned(p.k, p.d);
  launch.v_aligned = is_aligned(p.v, p.d_v);
  launch.o_aligned = is_aligned(p.o, p.d_v);
}

// The unit of scores: 1 where launch.modifies_scores makes natural logits of them. At least the
// smallest normal, so that -inf stays -inf.
template <class Launch>
void plan_scale(const Flash_fwd_params& p, Launch& launch) {
  constexpr float kLog2OfE = 1.4426950408889634f;
  const float scale = launch.modifies_scores ? 1.f : std::fabs(p.scale_softmax);
  launch.negate_q = !launch.modifies_scores && p.scale_softmax < 0.f;
  launch.scale = std::max(scale, std::numeric_limits<float>::min());
  launch.scale_log2 = std::max(launch.scale * kLog2OfE, std::numeric_limits<float>::min());
}

}  // namespace flash::sm80
