// Tensor maps: what a kernel that copies boxes of a tensor by TMA (compute capability 9.0) is given
// of that tensor. Terms are those of the CUDA driver API, "Tensor Map Object Management".
#pragma once

#include <cuda.h>

#include <array>

#include "base/cuda_driver/device.h"
#include "base/strided_view.h"

namespace flash::cuda {

// A tensor of 16-bit floats and the box of it that an instruction copies. Elements outside of the
// tensor are read as zeros and not written; L2 fetches 256 bytes at a time.
struct TensorBox {
  StridedView tensor;                        // can_map(tensor)
  std::array<int, kMaxMappedRank> box = {};  // elements, in the order of the tensor's dimensions
  int swizzle_bytes = 0;                     // 0, 32, 64, 128; at least box[0]'s bytes unless 0
  const char* name = "";                     // of the tensor, in error sentences
};

// The tensor map of `what` for kernels on `device`. Kept for this thread's next calls with the same
// description, so that a training loop, whose tensors come back at the same addresses, encodes
// once. The calling thread needs no current context. Throws ApiError: FLASH_ATTN_DEVICE_ERROR if
// the driver has no tensor maps or refuses, FLASH_ATTN_INVALID_ARGUMENT unless can_map(what.tensor)
// and the swizzle is one of those above.
CUtensorMap tensor_map(const Device& device, const TensorBox& what);

}  // namespace flash::cuda
