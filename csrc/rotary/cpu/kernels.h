// The CPU kernels as the rest of the library sees them.
#pragma once

#include "rotary/params.h"

namespace flash::rotary::cpu {

// Of one instruction set.
struct Kernels {
  void (*turn)(const Params& params);
};

// One translation unit each.
extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_wide16;

}  // namespace flash::rotary::cpu
