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
  static void multiply() {
    multiply(tile(kC), tile(kA), tile(kB));
  }

 private:
  static constexpr int kBytes = 1024, kElements = 256;
  static constexpr uint32_t kOdd = 0xffff0000u;  // of a pair, as the upper half of an fp32

  // As wide as AVX2's: sums of wider vectors would be kept in memory.
  typedef float Floats __attribute__((vector_size(32), may_alias));
  typedef uint32_t Pairs __attribute__((vector_size(32), may_alias));

  // Sanitizers would find nothing in registers of constant size, and take most of the tests' time.
  [[gnu::noinline, gnu::no_sanitize("address", "undefined")]]
  static void multiply(uint32_t* c, const uint32_t* a, const uint32_t* b) {
    for (int m = 0; m < 16; ++m) {
      Floats even[2] = {}, odd[2] = {};
      for (int k = 0; k < 16; ++k) {
        const Floats even_a = reinterpret_cast<Floats>(Pairs{} + (a[m * 16 + k] << 16));
        const Floats odd_a = reinterpret_cast<Floats>(Pairs{} + (a[m * 16 + k] & kOdd));
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const Pairs pairs = reinterpret_cast<const Pairs*>(b + k * 16)[half];
          even[half] += even_a * reinterpret_cast<Floats>(pairs << 16);
          odd[half] += odd_a * reinterpret_cast<Floats>(pairs & kOdd);
        }
      }
      for (int half = 0; half < 2; ++half)
        reinterpret_cast<Floats*>(c + m * 16)[half] += even[half] + odd[half];
    }
  }

  static uint32_t* tile(int i) {
    alignas(64) static thread_local uint32_t tiles[8][kElements];
    return tiles[i];
  }
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
