#include "hopper/kernel_list.h"

#include "hopper/smem.h"

// The fatbins that the build embeds.
#define FLASH_KERNEL(name, ...) extern "C" const char name##_fatbin[];
#include "generated/hopper_fwd.inc"
#undef FLASH_KERNEL

namespace flash::hopper {
namespace {

// Of a CTA of compute capability 9.0 (CUDA C++ Programming Guide, "Technical Specifications per
// Compute Capability").
constexpr size_t kMaxSharedBytes = 227 * 1024;

template <FwdConfig C>
constexpr FwdKernel fwd_kernel(const char* name, const void* fatbin) {
  static_assert(sizeof(SmemPlan<C>) <= kMaxSharedBytes);
  return {C, {name, fatbin}, C.threads(), sizeof(SmemPlan<C>)};
}

#define FLASH_KERNEL(name, ...) fwd_kernel<__VA_ARGS__>(#name, name##_fatbin),
constexpr FwdKernel fwd_kernels[] = {
#include "generated/hopper_fwd.inc"
};
#undef FLASH_KERNEL

}  // namespace

const std::span<const FwdKernel> kFwdKernels = fwd_kernels;

}  // namespace flash::hopper
