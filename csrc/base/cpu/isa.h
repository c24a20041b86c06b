// The instruction sets that CPU kernels are compiled for, and the one in use.
#pragma once

namespace flash::cpu {

// Those of CPUs, then software of AVX2 that stands for three of them in tests (built with
// FLASH_ATTN_SOFTWARE_ISAS): the loops of AVX-512's units over vectors of 16 floats, and those of
// AVX-512-BF16's and AMX's with their products in software.
enum class Isa {
  kBaseline,
  kAvx2,
  kAvx512,
  kAvx512Bf16,
  kAmx,
  kWide16,
  kSoftDot,
  kSoftTiles,
};
inline constexpr int kCpuIsas = 5, kIsas = 8;

// "baseline", "avx2", "avx512", "avx512bf16", "amx", "wide16", "soft_dot", "soft_tiles".
const char* isa_name(Isa isa);

struct IsaList {
  Isa isas[kIsas];
  int count;

  const Isa* begin() const { return isas; }
  const Isa* end() const { return isas + count; }
};

// Those of this build that this CPU runs, best last; baseline is always one. Software is no better
// than what it runs on.
const IsaList& available_isas();

// The one in use: set_current_isa's, else FLASH_ATTENTION_CPU_ISA's, else the best. Both throw
// ApiError if a variable of the environment that they read has a value that it cannot have.
Isa current_isa();
// False when no such instruction set is available. nullptr restores the default.
bool set_current_isa(const char* name);

// Products of bf16 that units with bf16 tiles make one fp32 product of: 6, as accurate as fp32, or,
// with FLASH_ATTENTION_CPU_FP32_PRODUCTS=3 in the environment, 3: relative error 2^-16. The first
// call throws ApiError if the variable has another value; choosing an instruction set is one.
int fp32_products();

}  // namespace flash::cpu
