// Vectors of the rows of matrices, for operators that go over their elements once.
#pragma once

#include "base/cpu/rows.h"
#include "base/matrix.h"
#include "base/static_for.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// A row of a tensor that is read; `absent` where there is none.
template <Dtype T>
struct RowIn {
  const char* ptr;
  float absent;

  FLASH_INLINE Vec load(int64_t i) const {
    return ptr == nullptr ? set1(absent) : load_as_float<T>(ptr, i);
  }
  FLASH_INLINE Vec tail(int64_t i, int n) const {
    return ptr == nullptr ? set1(absent) : load_tail<T>(ptr, i, n);
  }
};

// A row of a tensor that is written, where there is one.
template <Dtype T>
struct RowOut {
  char* ptr;

  FLASH_INLINE void store(int64_t i, Vec v) const {
    if (ptr != nullptr) store_from_float<T>(ptr, i, v);
  }
  FLASH_INLINE void tail(int64_t i, int n, Vec v) const {
    if (ptr != nullptr) store_tail<T>(ptr, i, n, v);
  }
};

template <Dtype T>
FLASH_INLINE RowIn<T> row_in(const Matrix& m, int64_t row, float absent) {
  return {m.ptr == nullptr ? nullptr : m.row(row, dtype_bytes(T)), absent};
}
template <Dtype T>
FLASH_INLINE RowOut<T> row_out(const Matrix& m, int64_t row) {
  return {m.ptr == nullptr ? nullptr : m.row(row, dtype_bytes(T))};
}

// Calls body(first, count) for whole vectors of first..end, then for what is left of it.
template <class Body>
FLASH_INLINE void for_vectors(int64_t first, int64_t end, const Body& body) {
  int64_t i = first;
  for (; i + kWidth <= end; i += kWidth) body(i, Constant<kWidth>{});
  if (i < end) body(i, static_cast<int>(end - i));
}

// For for_vectors' bodies: n is a constant where there is a whole vector.
template <class Row>
FLASH_INLINE Vec load_from(const Row& row, int64_t i, Constant<kWidth>) {
  return row.load(i);
}
template <class Row>
FLASH_INLINE Vec load_from(const Row& row, int64_t i, int n) {
  return row.tail(i, n);
}
template <class Row>
FLASH_INLINE void store_to(const Row& row, int64_t i, Constant<kWidth>, Vec v) {
  row.store(i, v);
}
template <class Row>
FLASH_INLINE void store_to(const Row& row, int64_t i, int n, Vec v) {
  row.tail(i, n, v);
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
