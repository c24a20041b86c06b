// Matrices of the caller as kernels of the fused operators take them: rows at any distance,
// elements side by side.
#pragma once

#include <cstdint>

#include "base/dtype.h"

namespace flash {

struct Matrix {
  void* ptr = nullptr;     // nullptr: not given
  int64_t row_stride = 0;  // elements; 0: every row is the same

  FLASH_INLINE char* row(int64_t i, int element_bytes) const {
    return static_cast<char*>(ptr) + i * row_stride * element_bytes;
  }
};

}  // namespace flash
