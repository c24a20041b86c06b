#include "base/cuda_driver/row_kernel.h"

#include <algorithm>
#include <limits>

namespace flash::cuda {

const RowKernel& kernel_of(std::span<const RowKernel> kernels, Dtype dtype) {
  return *std::find_if(kernels.begin(), kernels.end(),
                       [=](const RowKernel& kernel) { return kernel.config.dtype == dtype; });
}

void launch_rows(const RowKernel& kernel, int64_t threads, const Target& target, void** args) {
  const int64_t ctas = (threads + RowConfig::threads() - 1) / RowConfig::threads();
  require(ctas <= std::numeric_limits<int>::max(), "the tensors have too many rows for one launch");
  target.device->launch(
      kernel.image, {static_cast<unsigned>(ctas), static_cast<unsigned>(RowConfig::threads()), 0},
      target.stream, args);
}

}  // namespace flash::cuda
