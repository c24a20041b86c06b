// Arithmetic that C++ has no word for.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "base/host_device.h"

namespace flash::ptx {

// ex2.approx.ftz.f32: 2^x, relative error at most 2^-22.5; 2^-inf = 0 (PTX ISA, "Floating
// Point Instructions: ex2").
FLASH_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// rcp.approx.ftz.f32: 1 / x, at most 1 ulp off; 1 / inf = 0 (PTX ISA, "Floating Point Instructions:
// rcp").
FLASH_DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// prmt.b32 of one register: byte i of the result is byte kSelector[4 i + 2 : 4 i] of x, or, where
// bit 4 i + 3 is set, eight times its sign (PTX ISA, "Data Movement and Conversion Instructions:
// prmt").
template <uint32_t kSelector>
FLASH_DEVICE uint32_t prmt(uint32_t x) {
  uint32_t y;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(x), "n"(kSelector));
  return y;
}

// cvt.rn.{f16x2, bf16x2}.f32: `low` in the low half (PTX ISA, "Data Movement and
// Conversion Instructions: cvt").
template <Dtype kDtype>
FLASH_DEVICE uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (kDtype == Dtype::kFloat16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    static_assert(kDtype == Dtype::kBFloat16);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

}  // namespace flash::ptx
