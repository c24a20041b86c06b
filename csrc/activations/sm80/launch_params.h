// What a launch takes beside the checked arguments.
#pragma once

#include "activations/params.h"
#include "base/fast_divide.h"

namespace flash::activations::sm80 {

// A thread has its columns of a strip of rows: one row, or where rows are summed several.
struct Launch {
  int64_t threads;  // that have work
  FastDivide threads_of_row;
  bool by_chunks;  // of 16 bytes; otherwise by elements
  int rows_of_strip, strips;
  float* sums;  // [strips, cols], of dx; nullptr: not wanted
};

}  // namespace flash::activations::sm80
