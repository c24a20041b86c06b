// Launches of kernels that work row by row.
#pragma once

#include <span>

#include "base/cuda_driver/device.h"
#include "base/row_config.h"
#include "base/target.h"

namespace flash::cuda {

// Without dynamic shared memory.
struct RowKernel {
  RowConfig config;
  KernelImage image;
};

// The one of `kernels` for a dtype.
const RowKernel& kernel_of(std::span<const RowKernel> kernels, Dtype dtype);

// Enqueues a kernel of `threads` threads, filled up to whole CTAs. Throws ApiError.
void launch_rows(const RowKernel& kernel, int64_t threads, const Target& target, void** args);

}  // namespace flash::cuda
