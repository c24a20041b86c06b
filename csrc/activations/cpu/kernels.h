// The CPU kernels as the rest of the library sees them.
#pragma once

#include "activations/params.h"

namespace flash::activations::cpu {

// Of one instruction set.
struct Kernels {
  void (*fwd)(const Params& params);
  void (*bwd)(const Params& params);
};

// One translation unit each.
extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_wide16;

}  // namespace flash::activations::cpu
