// What launches take beside the checked arguments.
#pragma once

#include "layer_norm/params.h"

namespace flash::layer_norm::sm80 {

// dtype: of sums; each tensor has its own.
struct NormConfig {
  Dtype dtype;

  static consteval int threads() { return 512; }
  static consteval int ctas_per_sm() { return 1; }
};

inline constexpr int kChunk = 4;            // columns that a thread reads at a time
inline constexpr int kColumnsOfThread = 8;  // of a tile

struct Launch {
  int lanes;         // threads of a row, a power of two from 32 on
  int tiles;         // of lanes * kColumnsOfThread columns
  bool by_chunks;    // of kChunk columns; otherwise by elements
  uint32_t* faults;  // by IndexTensor
};

// Where CTAs leave their sums over rows: [parts of gradient][cols rounded up to kChunk].
struct Partials {
  float* of[kGradients];  // null: not wanted
  int64_t stride;
};

struct SumsLaunch {
  Partials partials;
  int parts[kGradients];
  TypedMatrix to[kGradients];
  int cols;
};

}  // namespace flash::layer_norm::sm80
