// C = A B or C += A B over grids of tiles (pack_bf16.h), in blocks of up to 2 x 2 tiles of C.
#pragma once

#include <type_traits>

#include "cpu/pack_bf16.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// Products of terms that make up one product of numbers, the smallest first. Inputs are what
// products of inputs (S = Q K^T, dP = dO V^T) are made of; the others have P or dS, which are
// rounded to the terms.
struct OneTerm {  // bf16
  using Inputs = OneTerm;
  static constexpr int kTerms = 1, kProducts = 1;
  static constexpr int kA[] = {0}, kB[] = {0};
};
struct TwoTerms {  // fp32 if its user wants: relative error 2^-16
  using Inputs = TwoTerms;
  static constexpr int kTerms = 2, kProducts = 3;
  static constexpr int kA[] = {1, 0, 0}, kB[] = {0, 1, 0};
};
struct FourProducts {  // of numbers that two terms hold: exact
  static constexpr int kTerms = 2, kProducts = 4;
  static constexpr int kA[] = {1, 1, 0, 0}, kB[] = {1, 0, 1, 0};
};
struct Fp16Terms : TwoTerms {  // an error of S or dP is one of LSE or dS, in fp32
  using Inputs = FourProducts;
};
struct ThreeTerms {  // fp32: relative error 2^-24
  using Inputs = ThreeTerms;
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

// Streams: read once here, while the other operand stays in L1.
template <class Tile, int kTile, bool kStreams>
FLASH_INLINE void load_operand(const uint32_t* p) {
  if constexpr (kStreams)
    Tile::template load_once<kTile>(p, 64);
  else
    Tile::template load<kTile>(p, 64);
}

template <class Tile, class Terms, int M, class Between>
FLASH_INLINE void multiply_registers(const TileProduct& x, int m, int n, Between& caller) {
  constexpr bool kStreamsA = requires { typename Between::StreamsA; };  // rather than B
  Between between = caller;
  // Everything the loop needs is a local variable: a tile instruction may write whatever lies in
  // memory, as far as the compiler knows. So is what between() needs: a copy.
  float *c0 = x.c + m * x.c_m + n * x.c_n, *c1 = c0 + x.c_n;
  float *c2 = c0 + x.c_m, *c3 = c1 + x.c_m;
  const int64_t c_bytes = x.c_ld * 4, words = int64_t{x.k_end - x.k_begin} * kTileWords;
  const int64_t a_row = int64_t{x.a.depth_tiles} * kTileWords,
                b_column = int64_t{x.b.depth_tiles} * kTileWords;
  if (x.add) {
    Tile::template load<0>(c0, c_bytes);
    Tile::template load<1>(c1, c_bytes);
    if constexpr (M == 2) {
      Tile::template load<2>(c2, c_bytes);
      Tile::template load<3>(c3, c_bytes);
    }
  } else {
    Tile::template zero<0>();
    Tile::template zero<1>();
    if constexpr (M == 2) {
      Tile::template zero<2>();
      Tile::template zero<3>();
    }
  }
  for (int p = 0; p < Terms::kProducts; ++p) {
    const uint32_t* a = x.a.tile(Terms::kA[p], m, x.k_begin);
    const uint32_t* b = x.b.tile(Terms::kB[p], n, x.k_begin);
    for (const uint32_t* end = a + words; a != end; a += kTileWords, b += kTileWords) {
      load_operand<Tile, 4, kStreamsA>(a);
      load_operand<Tile, 6, !kStreamsA>(b);
      load_operand<Tile, 7, !kStreamsA>(b + b_column);
      between();
      Tile::template multiply<0, 4, 6>();
      if constexpr (M == 2) load_operand<Tile, 5, kStreamsA>(a + a_row);
      between();
      Tile::template multiply<1, 4, 7>();
      if constexpr (M == 2) {
        between();
        Tile::template multiply<2, 5, 6>();
        between();
        Tile::template multiply<3, 5, 7>();
      }
    }
  }
  if constexpr (std::is_copy_assignable_v<Between>) caller = between;
  Tile::template store<0>(c0, c_bytes);
  Tile::template store<1>(c1, c_bytes);
  if constexpr (M == 2) {
    Tile::template store<2>(c2, c_bytes);
    Tile::template store<3>(c3, c_bytes);
  }
}

// Rows of tiles [m, m + M), M = 1 or 2, and columns of tiles n, n + 1; between() runs before every
// tile product: vector work that the tile unit hides. A Between with the type StreamsA says that A
// streams through L1 rather than B; one that can be assigned gets its state back.
template <class Tile, class Terms, int M, class Between>
FLASH_INLINE void multiply_tiles(const TileProduct& x, int m, int n, Between& between) {
  if constexpr (requires { Tile::template multiply_block<Terms, M>(x, m, n, between); })
    return Tile::template multiply_block<Terms, M>(x, m, n, between);
  else
    return multiply_registers<Tile, Terms, M>(x, m, n, between);
}

// Rows of tiles [0, m_tiles), columns of tiles [n_begin, n_end), an even number.
template <class Tile, class Terms, class Between>
inline void multiply(const TileProduct& x, int m_tiles, int n_begin, int n_end, Between&& between) {
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
  return 2 * m_tiles * ((n_end - n_begin) / 2) * Terms::kProducts * (x.k_end - x.k_begin);
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
