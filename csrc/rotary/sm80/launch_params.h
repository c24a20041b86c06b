// What a launch takes beside the checked arguments.
#pragma once

#include "base/fast_divide.h"
#include "rotary/params.h"

namespace flash::rotary::sm80 {

// Threads are numbered [token][group of heads][unit]: the units of a head are accesses of pairs
// that are turned, then of elements that are copied.
struct Launch {
  int first_token;
  int threads;  // that turn or copy
  FastDivide threads_of_token, units, seqlen;
  int turning_units;
  int heads_of_thread, groups_of_q;
  bool by_chunks;    // of 16 bytes; otherwise by elements
  uint32_t* faults;  // [kIndexTensors], not 0: the tensor had an element out of range
};

}  // namespace flash::rotary::sm80
