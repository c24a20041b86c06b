// C = A B or C += A B over grids of tiles (pack_bf16.h), in blocks of up to 2 x 2 tiles of C.
#pragma once

#include "cpu/pack_bf16.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// Products of terms that make up one product of numbers, the smallest first.
struct OneTerm {  // bf16
  static constexpr int kTerms = 1, kProducts = 1;
  static constexpr int kA[] = {0}, kB[] = {0};
};
struct TwoTerms {  // fp16: relative error 2^-16
  static constexpr int kTerms = 2, kProducts = 3;
  static constexpr int kA[] = {1, 0, 0}, kB[] = {0, 1, 0};
};
struct ThreeTerms {  // fp32: relative error 2^-24
  static constexpr int kTerms = 3, kProducts = 6;
  static constexpr int kA[] = {2, 1, 0, 1, 0, 0}, kB[] = {0, 1, 2, 0, 1, 0};
};

struct TileProduct {
  Packed a, b;
  int k_begin, k_end;  // tiles of the sum
  float* c;            // tile (m, n) at m * c_m + n * c_n, its rows c_ld apart; all in floats
  int64_t c_m, c_n, c_ld;
  bool add;  // to C, instead of overwriting it
};
// C row-major.
inline TileProduct row_major_product(const Packed& a, const Packed& b, float* c, int64_t ld) {
  return {a, b, 0, a.depth_tiles, c, kTileSide * ld, kTileSide, ld, false};
}
// C a grid of tiles of 1 KiB with n_tiles columns of tiles.
inline TileProduct tiled_product(const Packed& a, const Packed& b, float* c, int64_t n_tiles) {
  return {a, b, 0, a.depth_tiles, c, n_tiles * kTileWords, kTileWords, kTileSide, true};
}

template <class Tile, int kC>
FLASH_INLINE void begin_tile(const TileProduct& x, int m, int n) {
  if (x.add)
    Tile::template load<kC>(x.c + m * x.c_m + n * x.c_n, x.c_ld * 4);
  else
    Tile::template zero<kC>();
}
template <class Tile, int kC>
FLASH_INLINE void end_tile(const TileProduct& x, int m, int n) {
  Tile::template store<kC>(x.c + m * x.c_m + n * x.c_n, x.c_ld * 4);
}

template <class Tile, class Terms, int M, class Between>
inline void multiply_registers(const TileProduct& x, int m, int n, Between& between) {
  begin_tile<Tile, 0>(x, m, n);
  begin_tile<Tile, 1>(x, m, n + 1);
  if constexpr (M == 2) {
    begin_tile<Tile, 2>(x, m + 1, n);
    begin_tile<Tile, 3>(x, m + 1, n + 1);
  }
  for (int p = 0; p < Terms::kProducts; ++p) {
    const int ta = Terms::kA[p], tb = Terms::kB[p];
    for (int k = x.k_begin; k < x.k_end; ++k) {
      Tile::template load<4>(x.a.tile(ta, m, k), 64);
      Tile::template load_once<6>(x.b.tile(tb, n, k), 64);
      Tile::template multiply<0, 4, 6>();
      Tile::template load_once<7>(x.b.tile(tb, n + 1, k), 64);
      Tile::template multiply<1, 4, 7>();
      if constexpr (M == 2) {
        Tile::template load<5>(x.a.tile(ta, m + 1, k), 64);
        Tile::template multiply<2, 5, 6>();
        Tile::template multiply<3, 5, 7>();
      }
      between();
    }
  }
  end_tile<Tile, 0>(x, m, n);
  end_tile<Tile, 1>(x, m, n + 1);
  if constexpr (M == 2) {
    end_tile<Tile, 2>(x, m + 1, n);
    end_tile<Tile, 3>(x, m + 1, n + 1);
  }
}

// Rows of tiles [m, m + M), M = 1 or 2, and columns of tiles n, n + 1; between() runs after every
// 2 M tile products: vector work that the tile unit hides.
template <class Tile, class Terms, int M, class Between>
inline void multiply_tiles(const TileProduct& x, int m, int n, Between& between) {
  if constexpr (requires { Tile::template multiply_block<Terms, M>(x, m, n, between); })
    return Tile::template multiply_block<Terms, M>(x, m, n, between);
  else
    return multiply_registers<Tile, Terms, M>(x, m, n, between);
}

// Rows of tiles [0, m_tiles), columns of tiles [n_begin, n_end), an even number.
template <class Tile, class Terms, class Between>
inline void multiply(const TileProduct& x, int m_tiles, int n_begin, int n_end, Between between) {
  int m = 0;
  for (; m + 2 <= m_tiles; m += 2)
    for (int n = n_begin; n < n_end; n += 2) multiply_tiles<Tile, Terms, 2>(x, m, n, between);
  if (m < m_tiles)
    for (int n = n_begin; n < n_end; n += 2) multiply_tiles<Tile, Terms, 1>(x, m, n, between);
}
template <class Tile, class Terms>
inline void multiply(const TileProduct& x, int m_tiles, int n_begin, int n_end) {
  multiply<Tile, Terms>(x, m_tiles, n_begin, n_end, [] {});
}

// Calls of between() in such a product.
template <class Terms>
inline int multiply_steps(const TileProduct& x, int m_tiles, int n_begin, int n_end) {
  return (m_tiles + 1) / 2 * ((n_end - n_begin) / 2) * Terms::kProducts * (x.k_end - x.k_begin);
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
