// The tile registers of AMX-BF16: eight of 16 rows of 64 bytes.
//
// Assembly instead of intrinsics: gcc 12's tile loads and stores do not tell the compiler that they
// touch memory, so that it moves ordinary loads and stores past them. Tile products treat
// subnormal numbers as 0.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace flash::cpu::FLASH_ATTN_ISA {

class TileAmx {
 public:
  static constexpr bool kIsSoftware = false;

  // Once before a thread's first tile and again after code that may have used AMX for itself.
  static void configure() {
    alignas(64) uint8_t config[64] = {1};  // palette 1, then bytes a row and rows of each tile
    for (int i = 0; i < 8; ++i) {
      config[16 + 2 * i] = 64;
      config[48 + i] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  // Tiles in use make context switches slower.
  static void release() { asm volatile("tilerelease"); }

  template <int kTile>
  FLASH_INLINE static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  // 16 rows of 64 bytes, `stride` bytes apart.
  template <int kTile>
  FLASH_INLINE static void load(const void* src, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(src), "r"(stride), "i"(kTile) : "memory");
  }
  // For an operand that streams through L1.
  template <int kTile>
  FLASH_INLINE static void load_once(const void* src, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(src), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  FLASH_INLINE static void store(void* dst, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(dst), "r"(stride), "i"(kTile) : "memory");
  }
  // C += A B: A of 16 x 32 bf16, B of 16 pairs of rows x 16 columns, C of 16 x 16 fp32.
  template <int kC, int kA, int kB>
  FLASH_INLINE static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
