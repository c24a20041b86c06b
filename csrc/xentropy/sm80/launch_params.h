// What a launch takes beside the checked arguments.
#pragma once

#include "base/index_tensors.h"
#include "xentropy/params.h"

namespace flash::xentropy::sm80 {

struct Launch {
  uint32_t* faults;  // [kIndexTensors], not 0: the tensor had an element out of range
};

}  // namespace flash::xentropy::sm80
