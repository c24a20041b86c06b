// What is known of a row's classes so far, and what follows from it; on the host and the device.
#pragma once

#include <cmath>

#include "xentropy/params.h"

namespace flash::xentropy {

// The differences of large numbers that nearly cancel are taken before anything is summed: neither
// loss nor gradient loses digits where all logits of a row are far from 0.
struct alignas(16) RowState {
  float max = -INFINITY;  // of z
  float sum = 0.f;        // of exp(z - anchor)
  float label = 0.f;      // z of the label's class; 0: not among the classes
  float centred = 0.f;    // sum of z - anchor

  FLASH_INLINE float anchor() const { return max == -INFINITY ? 0.f : max; }
  FLASH_INLINE float lse() const { return anchor() + logf(sum); }

  // Takes a larger maximum for the `count` classes that it has.
  FLASH_INLINE void raise(float larger, int64_t count) {
    const float before = anchor();
    max = larger;
    const float step = before - anchor();
    if (sum != 0.f) sum *= expf(step);
    centred += static_cast<float>(count) * step;
  }
};
static_assert(sizeof(RowState) == 16);

FLASH_INLINE RowState ignored_row() { return {0.f, 1.f, 0.f, 0.f}; }

struct Losses {
  float loss = 0.f, z_loss = 0.f;
};

FLASH_INLINE Losses losses_of(const RowState& s, const Options& o) {
  const float log_sum = logf(s.sum), to_label = s.anchor() - s.label;
  const float lse = s.anchor() + log_sum;
  Losses losses{log_sum + (1.f - o.label_smoothing) * to_label, o.lse_square_scale * lse * lse};
  if (o.label_smoothing != 0.f)
    losses.loss -= o.label_smoothing * (s.centred / static_cast<float>(o.num_classes));
  losses.loss += losses.z_loss;
  return losses;
}

// dlogits = exp(z - anchor) slope + base, at the label + at_label.
struct Gradient {
  float anchor, slope, base, at_label;
};

FLASH_INLINE Gradient gradient_of(const RowState& s, const Options& o, float dloss) {
  const float g = dloss * o.logit_scale;
  return {s.anchor(), g * (1.f + 2.f * o.lse_square_scale * s.lse()) / s.sum,
          -g * o.label_smoothing / static_cast<float>(o.num_classes),
          -g * (1.f - o.label_smoothing)};
}

}  // namespace flash::xentropy
