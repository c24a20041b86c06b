// What the plans of all launches share.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/flash.h"
#include "sm80/smem.h"

namespace flash::sm80 {

// Whether the rows of x start at multiples of 16 bytes.
inline bool is_aligned(const Operand& x) {
  bool aligned = reinterpret_cast<uintptr_t>(x.ptr) % kChunkBytes == 0;
  for (const int64_t stride : {x.batch_stride, x.row_stride, x.head_stride})
    aligned &= stride % kChunkElements == 0;
  return aligned;
}

// The unit of scores: 1 where the kernel makes natural logits of them (`is_modified`). At least the
// smallest normal, so that -inf stays -inf.
template <class Launch>
void plan_scale(const Flash_fwd_params& p, bool is_modified, Launch& launch) {
  constexpr float kLog2OfE = 1.4426950408889634f;
  const float scale = is_modified ? 1.f : std::fabs(p.scale_softmax);
  launch.negate_q = !is_modified && p.scale_softmax < 0.f;
  launch.scale = std::max(scale, std::numeric_limits<float>::min());
  launch.scale_log2 = std::max(launch.scale * kLog2OfE, std::numeric_limits<float>::min());
}

template <class Launch>
void plan_alignment(const Flash_fwd_params& p, Launch& launch) {
  launch.q_aligned = is_aligned(p.q);
  launch.k_aligned = is_aligned(p.k);
  launch.v_aligned = is_aligned(p.v);
  launch.o_aligned = is_aligned(p.o);
}

}  // namespace flash::sm80
