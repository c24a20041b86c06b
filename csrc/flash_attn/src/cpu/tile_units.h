// What forward and backward do alike on bf16 tiles: blocks of rows, units of scores.
#pragma once

#include "cpu/exp2_bf16.h"
#include "cpu/task_context.h"
#include "cpu/tile_product.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr int kBlockRows = 32;
inline constexpr int kUnitKeys = 32;
inline constexpr int kUnitScores = kBlockRows * kUnitKeys;
static_assert(kTileN == kTileDepth);  // columns of a tile of scores are whole tiles of a sum

// Tiles that hold so many rows.
inline int row_tiles(int rows) { return (rows + kTileSide - 1) / kTileSide; }

// 2^x to the accuracy that weights of these terms keep; inf where it is too large for a float.
template <class Terms>
FLASH_INLINE Vec exp2_for(Terms, Vec x) {
  return Terms::kTerms < 3 ? exp2_bf16(x) : exp2(min(set1(128.f), x));
}

// The same, but 0 instead of a subnormal number, which would make products with it take a hundred
// times as long.
template <class Terms>
FLASH_INLINE Vec normal_exp2_for(Terms, Vec x) {
  return Terms::kTerms < 3 ? exp2_bf16<true>(x) : exp2_for(Terms{}, x);
}

// 32 staged rows as columns [first, first + 32) of B.
template <int kTerms>
inline void pack_key_columns(const Packed& b, int first, const Staging& s) {
  pack_columns<kTerms>(b, first / kTileSide, s, 0);
  pack_columns<kTerms>(b, first / kTileSide + 1, s, kTileSide);
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
