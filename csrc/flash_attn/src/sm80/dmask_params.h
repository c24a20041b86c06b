// What the kernel of S_dmask is given.
#pragma once

#include "common/dropout.h"
#include "common/fast_divide.h"
#include "common/flash.h"
#include "common/index_tensors.h"

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
