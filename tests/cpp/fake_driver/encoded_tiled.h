// The arguments of a call of the fake driver's cuTensorMapEncodeTiled.
#pragma once

#include <cstdint>

struct EncodedTiled {
  int type, rank;
  void* address;
  uint64_t extents[5], strides[4];  // as many as the rank tells, zeros behind them
  uint32_t box[5], element_strides[5];
  int interleave, swizzle, promotion, fill;
};
