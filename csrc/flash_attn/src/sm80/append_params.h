// What is known on the host of rows that are appended to a KV cache.
#pragma once

#include "base/fast_divide.h"
#include "base/index_tensors.h"

namespace flash::sm80 {

struct AppendPlan {
  int lanes;  // threads for a row: a power of 2, at most 32
  // Which rows are written. Where one cache's rows are parts of the other's, those are enough.
  bool writes_k, writes_v;
  bool k_aligned, v_aligned;  // rows start at multiples of 16 bytes, the new ones and the cache's
};

// What the append kernel is given beside the call's arguments.
struct AppendLaunch : AppendPlan {
  int64_t rows;  // batch * new tokens * key-value heads
  FastDivide page_size;
  IndexBounds bounds;
};

}  // namespace flash::sm80
