#pragma once

#include <cstdint>

#include "options.h"

namespace gpu_emulator::exec {

// Source lane and whether it is in range (PTX 9.7.9.6).
struct ShuffleSource {
  int lane;
  bool in_range;
};
inline ShuffleSource shuffle_source(ShuffleMode mode, int lane, uint32_t b, uint32_t c) {
  const int delta = static_cast<int>(b & 31);
  const int clamp = static_cast<int>(c & 31);
  const int segment = static_cast<int>(c >> 8 & 31);
  const int highest = (lane & segment) | (clamp & ~segment);
  const int lowest = lane & segment;
  int j;
  bool in_range;
  switch (mode) {
    case ShuffleMode::kUp:
      j = lane - delta;
      in_range = j >= highest;
      break;
    case ShuffleMode::kDown:
      j = lane + delta;
      in_range = j <= highest;
      break;
    case ShuffleMode::kButterfly:
      j = lane ^ delta;
      in_range = j <= highest;
      break;
    default:
      j = lowest | (delta & ~segment);
      in_range = j <= highest;
      break;
  }
  return {in_range ? j : lane, in_range};
}

}  // namespace gpu_emulator::exec
