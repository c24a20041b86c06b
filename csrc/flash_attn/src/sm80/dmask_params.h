// What the kernel of S_dmask is given.
#pragma once

#include "base/fast_divide.h"
#include "base/index_tensors.h"
#include "common/dropout.h"
#include "common/flash.h"

namespace flash::sm80 {

struct DmaskParams : Operands, SequenceGeometry, ScoreParams, DropoutParams {};

struct DmaskLaunch {
  int64_t rows;  // batch * query heads * seqlen_q_rounded
  int group;     // query heads for each key-value head
  FastDivide page_size;
  Dropout dropout;
  IndexBounds bounds;
};

}  // namespace flash::sm80
