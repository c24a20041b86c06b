// What launches have in common, on the host.
#pragma once

#include "base/cuda_driver/tensor_map.h"
#include "warp/smem_tile.h"

namespace flash::hopper {

inline constexpr int kSwizzledRows = 8;  // after which TMA's permutation of chunks begins anew

// A tensor map whose boxes are a group of columns of `rows` rows of one head.
inline CUtensorMap map_of(const cuda::Device& device, const StridedView& tensor, int head_dim,
                          int rows, const char* name) {
  const int bytes = dtype_bytes(tensor.dtype), columns = group_columns(head_dim, bytes);
  return cuda::tensor_map(device, {tensor, {columns, 1, rows, 1}, columns * bytes, name});
}

}  // namespace flash::hopper
