// Checked arguments, as kernels take them.
#pragma once

#include "base/matrix.h"

namespace flash::xentropy {

// Of the C interface.
struct Options {
  float label_smoothing, logit_scale, lse_square_scale;
  int64_t ignore_index;
  int64_t class_start, num_classes;
};

// [rows], int32 or int64.
struct Labels {
  const void* ptr;
  bool is_int64;

  FLASH_INLINE int64_t operator[](int64_t row) const {
    return is_int64 ? static_cast<const int64_t*>(ptr)[row] : static_cast<const int32_t*>(ptr)[row];
  }
};

struct Params {
  Dtype dtype;  // of logits and dlogits
  int64_t rows, cols;
  Matrix logits;
  Labels labels;
  Options options;
  float* state;  // [rows, 4]: a RowState each

  // Forward.
  int64_t classes_before;        // in the state; 0: it holds nothing yet
  const float* precomputed_lse;  // [rows]; nullptr: computed
  float *losses, *z_losses;      // [rows]; nullptr: not wanted

  // Backward.
  const float* dlosses;  // [rows]
  Matrix dlogits;
};

}  // namespace flash::xentropy
