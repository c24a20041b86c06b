#include "sm80/kernel_list.h"

#include "sm80/bwd_smem.h"
#include "sm80/decode_smem.h"
#include "sm80/smem.h"

// The fatbins that the build embeds.
#define FLASH_KERNEL(name, ...) extern "C" const char name##_fatbin[];
#include "generated/sm80_append.inc"
#include "generated/sm80_bias_gradient.inc"
#include "generated/sm80_bwd.inc"
#include "generated/sm80_bwd_prepare.inc"
#include "generated/sm80_combine.inc"
#include "generated/sm80_decode.inc"
#include "generated/sm80_decode_wide.inc"
#include "generated/sm80_dmask.inc"
#include "generated/sm80_fwd.inc"
#include "generated/sm80_sink_gradient.inc"
#undef FLASH_KERNEL

namespace flash::sm80 {
namespace {

template <FwdConfig C>
constexpr FwdKernel fwd_kernel(const char* name, const void* fatbin) {
  return {C, {name, fatbin}, C.threads(), sizeof(SmemPlan<C>)};
}

template <BwdConfig C>
constexpr BwdKernel bwd_kernel(const char* name, const void* fatbin) {
  return {C, C.tile(), {name, fatbin}, C.threads(), sizeof(BwdSmemPlan<C>)};
}

template <DecodeConfig C>
constexpr DecodeKernel decode_kernel(const char* name, const void* fatbin) {
  return {C,
          {name, fatbin},
          C.threads(),
          static_cast<int>(SmemPlan<C>::bytes()),
          C.ctas_per_sm(),
          C.block_keys()};
}

#define FLASH_KERNEL(name, ...) fwd_kernel<__VA_ARGS__>(#name, name##_fatbin),
constexpr FwdKernel fwd_kernels[] = {
#include "generated/sm80_fwd.inc"
};
#undef FLASH_KERNEL

#define FLASH_KERNEL(name, ...) bwd_kernel<__VA_ARGS__>(#name, name##_fatbin),
constexpr BwdKernel bwd_kernels[] = {
#include "generated/sm80_bwd.inc"
};
constexpr BwdKernel bias_gradient_kernels[] = {
#include "generated/sm80_bias_gradient.inc"
};
#undef FLASH_KERNEL

#define FLASH_KERNEL(name, ...) RowKernel{__VA_ARGS__, {#name, name##_fatbin}},
constexpr RowKernel append_kernels[] = {
#include "generated/sm80_append.inc"
};
constexpr RowKernel bwd_prepare_kernels[] = {
#include "generated/sm80_bwd_prepare.inc"
};
constexpr RowKernel combine_kernels[] = {
#include "generated/sm80_combine.inc"
};
constexpr RowKernel dmask_kernels[] = {
#include "generated/sm80_dmask.inc"
};
constexpr RowKernel sink_gradient_kernels[] = {
#include "generated/sm80_sink_gradient.inc"
};
#undef FLASH_KERNEL

#define FLASH_KERNEL(name, ...) decode_kernel<__VA_ARGS__>(#name, name##_fatbin),
constexpr DecodeKernel decode_kernels[] = {
#include "generated/sm80_decode.inc"
#include "generated/sm80_decode_wide.inc"
};
#undef FLASH_KERNEL

}  // namespace

const std::span<const FwdKernel> kFwdKernels = fwd_kernels;
const std::span<const BwdKernel> kBwdKernels = bwd_kernels;
const std::span<const BwdKernel> kBiasGradientKernels = bias_gradient_kernels;
const std::span<const RowKernel> kAppendKernels = append_kernels;
const std::span<const RowKernel> kBwdPrepareKernels = bwd_prepare_kernels;
const std::span<const RowKernel> kCombineKernels = combine_kernels;
const std::span<const RowKernel> kDmaskKernels = dmask_kernels;
const std::span<const RowKernel> kSinkGradientKernels = sink_gradient_kernels;
const std::span<const DecodeKernel> kDecodeKernels = decode_kernels;

}  // namespace flash::sm80
