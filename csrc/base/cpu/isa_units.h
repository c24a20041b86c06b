// The units of a fused operator, which are compiled for three instruction sets, and for wide16, the
// software of AVX-512's loops: what AVX-512-BF16 and AMX have beyond AVX-512 is products, of which
// these operators have none.
#pragma once

#include "base/cpu/isa.h"

// Of a table `name`_baseline, `name`_avx2, `name`_avx512: the best that this build has.
#if defined(FLASH_ATTN_HAVE_AVX2)
#define FLASH_AVX2_UNIT(name) name##_avx2
#else
#define FLASH_AVX2_UNIT(name) name##_baseline
#endif
#if defined(FLASH_ATTN_HAVE_AVX512)
#define FLASH_AVX512_UNIT(name) name##_avx512
#else
#define FLASH_AVX512_UNIT(name) FLASH_AVX2_UNIT(name)
#endif
#if defined(FLASH_ATTN_HAVE_WIDE16)
#define FLASH_WIDE16_UNIT(name) name##_wide16
#else
#define FLASH_WIDE16_UNIT(name) FLASH_AVX2_UNIT(name)
#endif
#define FLASH_CURRENT_UNIT(name)                                                              \
  ::flash::cpu::current_unit(name##_baseline, FLASH_AVX2_UNIT(name), FLASH_AVX512_UNIT(name), \
                             FLASH_WIDE16_UNIT(name))

namespace flash::cpu {

// That of the instruction set in use. Throws ApiError as current_isa does.
template <class Unit>
const Unit& current_unit(const Unit& baseline, const Unit& avx2, const Unit& avx512,
                         const Unit& wide16) {
  const Isa isa = current_isa();
  if (isa == Isa::kBaseline) return baseline;
  if (isa == Isa::kAvx2) return avx2;
  return static_cast<int>(isa) < kCpuIsas ? avx512 : wide16;
}

}  // namespace flash::cpu
