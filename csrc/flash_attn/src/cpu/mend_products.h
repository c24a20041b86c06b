// Products of numbers in terms (pack_bf16.h) where they came out as inf or NaN. Terms are right
// there only by chance: those of inf times a number's terms of both signs, or 0, are NaN, and so
// are those of products too large for fp32. The numbers themselves say what it is.
#pragma once

#include "cpu/tile_units.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline float dot(const float* a, const float* b, int padded) {
  Vec sum = zero();
  for (int i = 0; i < padded; i += kWidth) sum = fma(load(a + i), load(b + i), sum);
  return reduce_add(sum);
}

// Where two rows are read to, `padded` floats each, and what they are.
struct MendedRows {
  float *row, *key;
  Dtype dtype;  // of keys
  int d, padded;
};

// Products of a unit's rows with the keys from first_key on that they see: where they are not
// finite, once more in fp32.
template <class ReadRow, class KeyRow>  // ReadRow(r): row r into x.row; KeyRow(j) -> const void*
[[gnu::noinline]] void mend_products(float* products, const Row* rows, int count, int first_key,
                                     const MendedRows& x, ReadRow read_row_of, KeyRow key_row) {
  for (int r = 0; r < count; ++r) {
    float* s = products + r * kUnitKeys;
    const Vec low = abs(load(s)), high = abs(load(s + kWidth));
    if (all_of((low < __builtin_inff()) & (high < __builtin_inff()))) continue;
    const KeyRange seen = visible(rows[r], {0, kUnitKeys, first_key});
    bool is_read = false;
    for (int j = seen.begin; j < seen.end; ++j) {
      if (is_finite(s[j])) continue;
      if (!is_read) read_row_of(r);
      is_read = true;
      read_row(x.dtype, x.key, key_row(j), x.d, x.padded);
      s[j] = dot(x.row, x.key, x.padded);
    }
  }
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
