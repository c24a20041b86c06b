#include "xentropy/sm80/launch.h"

#include <limits>

#include "base/cuda_driver/row_kernel.h"
#include "xentropy/sm80/launch_params.h"

#define FLASH_KERNEL(name, ...) extern "C" const char name##_fatbin[];
#include "generated/sm80_xentropy_bwd.inc"
#include "generated/sm80_xentropy_fwd.inc"
#undef FLASH_KERNEL

namespace flash::xentropy::sm80 {
namespace {

#define FLASH_KERNEL(name, ...) cuda::RowKernel{__VA_ARGS__, {#name, name##_fatbin}},
constexpr cuda::RowKernel fwd_kernels[] = {
#include "generated/sm80_xentropy_fwd.inc"
};
constexpr cuda::RowKernel bwd_kernels[] = {
#include "generated/sm80_xentropy_bwd.inc"
};
#undef FLASH_KERNEL

// A CTA a row.
void launch(std::span<const cuda::RowKernel> kernels, Params p, const Target& target) {
  if (p.rows == 0) return;
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  require(p.classes_before + p.cols <= kMost - RowConfig::threads(),
          "logits has too many columns: ", p.cols);
  Launch launch{target.device->mailbox()};
  void* args[] = {&p, &launch};
  launch_rows(kernel_of(kernels, p.dtype), p.rows * RowConfig::threads(), target, args);
}

}  // namespace

void fwd(const Params& params, const Target& target) { launch(fwd_kernels, params, target); }
void bwd(const Params& params, const Target& target) { launch(bwd_kernels, params, target); }

}  // namespace flash::xentropy::sm80
