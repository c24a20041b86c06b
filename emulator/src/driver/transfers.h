#pragma once

// Copies and fills between checked ranges.

#include "driver.h"

namespace gpu_emulator::driver {

enum class Side { kDevice, kHost, kEither };

// The whole of the range is device memory of one allocation; with kEither it may be host memory
// that the driver does not know. Fails with CUDA_ERROR_INVALID_VALUE.
void check_range(Driver& state, Side side, uint64_t address, uint64_t bytes, const char* what);

// A copy of `height` rows.
struct Copy {
  Side destination_side, source_side;
  uint64_t destination, source;
  uint64_t width = 0;  // bytes
  uint64_t height = 1;
  uint64_t destination_pitch = 0, source_pitch = 0;  // bytes; of no meaning for one row
};
void submit_copy(Driver& state, const Copy& copy, CUstream stream);

// Rows of `width` elements of 1, 2 or 4 bytes.
struct Fill {
  uint64_t destination;
  uint64_t value;
  int element_bytes;
  uint64_t width = 0;  // elements
  uint64_t height = 1;
  uint64_t pitch = 0;  // bytes
};
void submit_fill(Driver& state, const Fill& fill, CUstream stream);

}  // namespace gpu_emulator::driver
