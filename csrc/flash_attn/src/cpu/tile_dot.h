// Products of bf16 pairs on vector registers (AVX-512-BF16), on the same packed operands as tile
// registers.
#pragma once

#include "cpu/tile_product.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// c + the product of pairs of bf16, subnormal numbers taken as 0 where the ISA has the instruction.
FLASH_INLINE Vec dot_pairs(Vec c, VecU a, VecU b) {
#if defined(__AVX512BF16__) && defined(FLASH_ATTN_SIMD_AVX512)
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
  const Vec odd = fma(from_bits(a & 0xffff0000u), from_bits(b & 0xffff0000u), c);
  return fma(from_bits(a << 16), from_bits(b << 16), odd);
#endif
}

class TileDot {
 public:
  static constexpr bool kIsSoftware = false;

  static void configure() {}
  static void release() {}

  // As multiply_tiles: 8 rows x 2 vectors of C at a time, 16 of 32 registers.
  template <class Terms, int M, class Between>
  static void multiply_block(const TileProduct& x, int m, int n, Between& between) {
    for (int half = 0; half < 2 * M; ++half) {
      const int row = half % 2 * kRows;
      float* c = x.c + (m + half / 2) * x.c_m + n * x.c_n + row * x.c_ld;
      Vec acc[kRows][2];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        acc[r][0] = x.add ? load(c + r * x.c_ld) : zero();
        acc[r][1] = x.add ? load(c + x.c_n + r * x.c_ld) : zero();
      }
      for (int p = 0; p < Terms::kProducts; ++p)
        for (int k = x.k_begin; k < x.k_end; ++k) {
          const uint32_t* b = x.b.tile(Terms::kB[p], n, k);
          const uint32_t* b_next = x.b.tile(Terms::kB[p], n + 1, k);
          add_products(acc, x.a.tile(Terms::kA[p], m + half / 2, k) + row * kTileSide, b, b_next);
          between();
        }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        store(c + r * x.c_ld, acc[r][0]);
        store(c + x.c_n + r * x.c_ld, acc[r][1]);
      }
    }
  }

 private:
  static constexpr int kRows = 8;

  FLASH_INLINE static VecU load_pairs(const uint32_t* p) {
    VecU v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  FLASH_INLINE static void add_products(Vec (&acc)[kRows][2], const uint32_t* a, const uint32_t* b,
                                        const uint32_t* b_next) {
#pragma GCC unroll 2
    for (int k = 0; k < kTileSide; ++k) {
      const VecU b0 = load_pairs(b + k * 16), b1 = load_pairs(b_next + k * 16);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const VecU av = VecU{} + a[r * kTileSide + k];
        acc[r][0] = dot_pairs(acc[r][0], av, b0);
        acc[r][1] = dot_pairs(acc[r][1], av, b1);
      }
    }
  }
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
