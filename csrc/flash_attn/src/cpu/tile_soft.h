// The tile registers of AMX-BF16 in software: same interface as tile_amx.h, same order of
// operations, so that the loops over tiles run and are tested on any machine.
#pragma once

#include "base/cpu/simd.h"

namespace flash::cpu::FLASH_ATTN_ISA {

class TileSoft {
 public:
  static constexpr bool kIsSoftware = true;

  FLASH_INLINE static void configure() {}
  FLASH_INLINE static void release() {}

  template <int kTile>
  [[gnu::noinline]] static void zero() {
    std::memset(tile(kTile), 0, kBytes);
  }
  template <int kTile>
  [[gnu::noinline]] static void load(const void* src, int64_t stride) {
    for (int row = 0; row < 16; ++row)
      std::memcpy(tile(kTile) + row * 16, static_cast<const char*>(src) + row * stride, 64);
  }
  template <int kTile>
  [[gnu::noinline]] static void load_once(const void* src, int64_t stride) {
    load<kTile>(src, stride);
  }
  template <int kTile>
  [[gnu::noinline]] static void store(void* dst, int64_t stride) {
    for (int row = 0; row < 16; ++row)
      std::memcpy(static_cast<char*>(dst) + row * stride, tile(kTile) + row * 16, 64);
  }

  // TDPBF16PS (Intel SDM volume 2): C[m][n] += sum over pairs k of A[m][k] . B[k][n], even and odd
  // elements summed apart.
  template <int kC, int kA, int kB>
  [[gnu::noinline]] static void multiply() {
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 16; n += kWidth) {
        Vec even = FLASH_ATTN_ISA::zero(), odd = even;
        for (int k = 0; k < 16; ++k) {
          const VecU a = VecU{} + tile(kA)[m * 16 + k];
          VecU b;
          std::memcpy(&b, tile(kB) + k * 16 + n, sizeof(b));
          even = fma(from_bits(a << 16), from_bits(b << 16), even);
          odd = fma(from_bits(a & kHigh), from_bits(b & kHigh), odd);
        }
        float* c = reinterpret_cast<float*>(tile(kC)) + m * 16 + n;
        FLASH_ATTN_ISA::store(c, FLASH_ATTN_ISA::load(c) + (even + odd));
      }
  }

 private:
  static constexpr int kBytes = 1024;
  static constexpr uint32_t kHigh = 0xffff0000u;
  static uint32_t* tile(int i) {
    alignas(64) static thread_local uint32_t tiles[8][256];
    return tiles[i];
  }
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
