// Attention sinks: keys without value, one a head.
#pragma once

#include <cmath>
#include <cstdint>

#include "base/ptx/elements.h"
#include "common/flash.h"
#include "common/softmax.h"

namespace flash {

// -inf without sinks.
FLASH_DEVICE float sink_logit(const ScoreParams& p, int head) {
  if (p.s_aux == nullptr) return -INFINITY;
  const int64_t index = head * p.s_aux_stride;
  switch (p.s_aux_dtype) {
    case Dtype::kFloat16:
      return ptx::to_float<Dtype::kFloat16>(static_cast<const uint16_t*>(p.s_aux)[index]);
    case Dtype::kBFloat16:
      return ptx::to_float<Dtype::kBFloat16>(static_cast<const uint16_t*>(p.s_aux)[index]);
    default:
      return static_cast<const float*>(p.s_aux)[index];
  }
}

// Takes in a sink, a key without value whose logit is `sink`, of any size. `scale` is that of the
// state's scores. Returns what the row's output must be multiplied by.
FLASH_DEVICE float add_sink(RowState& state, float& scale, float sink) {
  RowState natural{state.max == -INFINITY ? -INFINITY : state.max * scale, state.sum};
  const MergeFactors factors =
      merge(natural, RowState{sink, 1.f}, [](float x) { return __expf(x); });
  state = natural;
  scale = 1.f;
  return factors.total;
}

}  // namespace flash
