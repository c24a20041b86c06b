// Every kernel of this backend, from generate_kernels.py, for the host.
#pragma once

#include <span>

#include "base/cuda_driver/device.h"
#include "base/cuda_driver/row_kernel.h"
#include "hopper/bwd_tile_size.h"
#include "hopper/decode_table.h"
#include "hopper/tile_size.h"

namespace flash::hopper {

struct FwdKernel {
  FwdConfig config;
  cuda::KernelImage image;
  int threads, shared_bytes;  // of a CTA
};

struct DecodeKernel {
  DecodeConfig config;
  DecodeTile tile;
  cuda::KernelImage image;
  int threads, shared_bytes;  // of a CTA
};

struct BwdKernel {
  BwdConfig config;
  BwdTile tile;
  cuda::KernelImage image;
  int threads, shared_bytes;  // of a CTA
};

extern const std::span<const FwdKernel> kFwdKernels;
extern const std::span<const DecodeKernel> kDecodeKernels;
extern const std::span<const BwdKernel> kBwdKernels;
extern const std::span<const cuda::RowKernel> kBwdPrepareKernels;

}  // namespace flash::hopper
