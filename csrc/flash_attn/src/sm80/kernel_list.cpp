#include "sm80/kernel_list.h"

#include "sm80/smem.h"

// The fatbins that the build embeds, each under its kernel's name.
#define FLASH_SM80_FWD(dtype, head_dim, mask) \
  extern "C" const char flash_fwd_sm80_##dtype##_d##head_dim##_##mask##_fatbin[];
#include "sm80/kernels.inc"
#undef FLASH_SM80_FWD

namespace flash::sm80 {
namespace {

// The words of kernels.inc.
constexpr Dtype fp16 = Dtype::kFloat16, bf16 = Dtype::kBFloat16;
constexpr MaskClass none = MaskClass::kNone, causal_local = MaskClass::kCausalLocal;

template <FwdConfig C>
constexpr FwdKernel fwd_kernel(const char* name, const void* fatbin) {
  return {C, {name, fatbin}, C.threads(), sizeof(SmemPlan<C>)};
}

#define FLASH_SM80_FWD(dtype, head_dim, mask)            \
  fwd_kernel<FwdConfig{dtype, head_dim, mask}>(          \
      "flash_fwd_sm80_" #dtype "_d" #head_dim "_" #mask, \
      flash_fwd_sm80_##dtype##_d##head_dim##_##mask##_fatbin),
constexpr FwdKernel kernels[] = {
#include "sm80/kernels.inc"
};
#undef FLASH_SM80_FWD

}  // namespace

const std::span<const FwdKernel> kFwdKernels = kernels;

}  // namespace flash::sm80
