// What the plans of all launches share.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/flash.h"
#include "sm80/fwd_params.h"
#include "sm80/launch.h"

namespace flash::sm80 {

inline bool modifies_scores(const ScoreParams& p) {
  return p.softcap > 0.f || p.alibi_slopes != nullptr || p.bias.ptr != nullptr;
}

// All of a plan that does not depend on the kernel. The unit of scores is at least the smallest
// normal, so that -inf stays -inf.
inline void plan_attention(const Flash_fwd_params& p, AttentionLaunch& launch) {
  constexpr float kLeast = std::numeric_limits<float>::min();
  launch.modifies_scores = modifies_scores(p);
  const float scale = launch.modifies_scores ? 1.f : std::fabs(p.scale_softmax);
  launch.negate_q = !launch.modifies_scores && p.scale_softmax < 0.f;
  launch.scale = std::max(scale, kLeast);
  launch.scale_log2 = std::max(launch.scale * kLog2e, kLeast);
  launch.q_aligned = is_aligned(p.q, p.d);
  launch.k_aligned = is_aligned(p.k, p.d);
  launch.v_aligned = is_aligned(p.v, p.d_v);
  launch.o_aligned = is_aligned(p.o, p.d_v);
  launch.page_size = page_size(p);
  launch.bounds = index_bounds(p);
}

}  // namespace flash::sm80
