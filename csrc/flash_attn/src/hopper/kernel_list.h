// Every kernel of this backend, from generate_kernels.py, for the host.
#pragma once

#include <span>

#include "base/cuda_driver/device.h"
#include "hopper/tile_size.h"

namespace flash::hopper {

struct FwdKernel {
  FwdConfig config;
  cuda::KernelImage image;
  int threads, shared_bytes;  // of a CTA
};

extern const std::span<const FwdKernel> kFwdKernels;

}  // namespace flash::hopper
