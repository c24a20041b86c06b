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

// max.NaN.f32: NaN if x or y is (PTX ISA, "Floating Point Instructions: max").
FLASH_DEVICE float max_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// fma.rn.{f16x2, bf16x2}: a b + c of both halves; inf and NaN times 0 are NaN (PTX ISA, "Half
// Precision Floating Point Instructions: fma").
template <Dtype kDtype>
FLASH_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  if constexpr (kDtype == Dtype::kFloat16) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    static_assert(kDtype == Dtype::kBFloat16);
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
  return d;
}

// mul.wide.u32, its halves apart: {low, high} (PTX ISA, "Integer Arithmetic Instructions: mul").
FLASH_DEVICE uint2 mul_wide(uint32_t a, uint32_t b) {
  uint2 product;
  asm("{\n .reg .b64 p;\n mul.wide.u32 p, %2, %3;\n mov.b64 {%0, %1}, p;\n}"
      : "=r"(product.x), "=r"(product.y)
      : "r"(a), "r"(b));
  return product;
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

// prmt.b32: byte i of the result is byte `selector`[4 i + 2 : 4 i] of {low, high}.
FLASH_DEVICE uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(low), "r"(high), "r"(selector));
  return y;
}

// cvt.rn.satfinite.e4m3x2.f32: four elements, the first in the lowest byte; beyond +-448 they are
// that, NaN stays NaN (PTX ISA, "Data Movement and Conversion Instructions: cvt"; sm_89).
FLASH_DEVICE uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
  uint32_t packed;
  asm("{\n .reg .b16 low, high;\n"
      " cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      " cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      " mov.b32 %0, {low, high};\n}"
      : "=r"(packed)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
  return packed;
}

// cvt.rn.f16x2.e4m3x2: the two lowest bytes as halves, exact.
FLASH_DEVICE uint32_t unpack_e4m3(uint32_t pair) {
  uint32_t halves;
  asm("{\n .reg .b16 low;\n"
      " cvt.u16.u32 low, %1;\n"
      " cvt.rn.f16x2.e4m3x2 %0, low;\n}"
      : "=r"(halves)
      : "r"(pair));
  return halves;
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
