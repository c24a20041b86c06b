// The instruction sets' kernels, one translation unit each.
#pragma once

#include "cpu/cpu_backend.h"

namespace flash::cpu {

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace flash::cpu
