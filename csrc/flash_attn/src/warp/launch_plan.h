// What the plans of all launches share, on the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "base/fast_divide.h"
#include "common/flash.h"
#include "warp/attention_launch.h"
#include "warp/smem_tile.h"

namespace flash {

inline bool modifies_scores(const ScoreParams& p) {
  return p.softcap > 0.f || p.alibi_slopes != nullptr || p.bias.ptr != nullptr;
}

// Whether the rows of x are chunks of 16 bytes that start at multiples of 16.
inline bool is_aligned(const Operand& x, int64_t head_dim) {
  bool aligned =
      reinterpret_cast<uintptr_t>(x.ptr) % kChunkBytes == 0 && head_dim % kChunkElements == 0;
  for (const int64_t stride : {x.batch_stride, x.row_stride, x.head_stride})
    aligned &= stride % kChunkElements == 0;
  return aligned;
}

// Of the call's pages; 1 without.
inline FastDivide page_size(const SequenceGeometry& p) {
  return p.block_table != nullptr ? FastDivide::by(static_cast<int>(p.page_size)) : FastDivide{};
}

// All of a plan that does not depend on the kernel. The unit of scores is at least the smallest
// normal, so that -inf stays -inf.
inline void plan_attention(const Flash_fwd_params& p, const IndexBounds& bounds,
                           AttentionLaunch& launch) {
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
  launch.bounds = bounds;
}

}  // namespace flash
