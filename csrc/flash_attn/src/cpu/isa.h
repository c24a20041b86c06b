// The instruction sets' kernels, one translation unit each.
#pragma once

#include "cpu/cpu_backend.h"

namespace flash::cpu {

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
extern const Kernels kernels_amx;

// Products of bf16 that units with bf16 tiles make one fp32 product of: 6, as accurate as fp32, or,
// with FLASH_ATTENTION_CPU_FP32_PRODUCTS=3 in the environment, 3: relative error 2^-16. The first
// call throws ApiError if the variable has another value; choosing an instruction set is one.
int fp32_products();

}  // namespace flash::cpu
