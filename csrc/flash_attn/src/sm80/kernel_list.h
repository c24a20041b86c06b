// Every kernel of this backend, from generate_kernels.py, for the host.
#pragma once

#include <span>

#include "base/cuda_driver/device.h"
#include "base/cuda_driver/row_kernel.h"
#include "sm80/bwd_table.h"
#include "sm80/decode_table.h"
#include "sm80/tile_table.h"

namespace flash::sm80 {

struct FwdKernel {
  FwdConfig config;
  cuda::KernelImage image;
  int threads, shared_bytes;  // of a CTA
};

struct BwdKernel {
  BwdConfig config;
  BwdTile tile;
  cuda::KernelImage image;
  int threads, shared_bytes;  // of a CTA
};

struct DecodeKernel {
  DecodeConfig config;
  cuda::KernelImage image;
  int threads, shared_bytes;  // of a CTA
  int ctas_per_sm;            // for which an SM has registers
  int block_keys;
};

extern const std::span<const FwdKernel> kFwdKernels;
extern const std::span<const BwdKernel> kBwdKernels, kBiasGradientKernels;
extern const std::span<const DecodeKernel> kDecodeKernels;

using cuda::RowKernel;

extern const std::span<const RowKernel> kAppendKernels, kBwdPrepareKernels, kCombineKernels,
    kDmaskKernels, kSinkGradientKernels;

}  // namespace flash::sm80
