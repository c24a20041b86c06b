// What a launch takes beside the checked arguments.
#pragma once

#include "activations/params.h"
#include "base/fast_divide.h"

namespace flash::activations::sm80 {

struct Launch {
  int64_t threads;  // that have work
  FastDivide threads_of_row;
  bool by_chunks;  // of 16 bytes; otherwise by elements
};

}  // namespace flash::activations::sm80
