// Checked arguments, as kernels take them.
#pragma once

#include "base/matrix.h"

namespace flash::activations {

// By the numbers of the C interface.
enum class Function : int { kGeluTanh, kRelu, kSqrelu, kSilu, kSigmoid };
inline constexpr int kFunctions = 5;

// out = f(x + bias) y forward; dx = dout y f'(x + bias), dy = dout f(x + bias) backward.
struct Params {
  Function function;
  Dtype dtype;
  int64_t rows, cols;
  Matrix x, bias, y;    // bias, y: may be absent
  Matrix out;           // forward
  Matrix dout, dx, dy;  // backward; dy: where y is
  float* dbias;         // [cols]; nullptr: not wanted
};

}  // namespace flash::activations
