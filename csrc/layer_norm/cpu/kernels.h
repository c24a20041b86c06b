// The CPU kernels as the rest of the library sees them.
#pragma once

#include "layer_norm/params.h"

namespace flash::layer_norm::cpu {

// Of one instruction set.
struct Kernels {
  void (*fwd)(const FwdParams& params);
  void (*bwd)(const BwdParams& params);
};

// One translation unit each.
extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_wide16;

}  // namespace flash::layer_norm::cpu
