#include "hopper/kernel_list.h"

#include "hopper/bwd_smem.h"
#include "hopper/decode_smem.h"
#include "hopper/smem.h"

// The fatbins that the build embeds.
#define FLASH_KERNEL(name, ...) extern "C" const char name##_fatbin[];
#include "generated/hopper_bwd.inc"
#include "generated/hopper_bwd_prepare.inc"
#include "generated/hopper_decode.inc"
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

template <DecodeConfig C>
constexpr DecodeKernel decode_kernel(const char* name, const void* fatbin) {
  static_assert(sizeof(DecodeSmem<C>) <= kMaxSharedBytes);
  return {C, C.tile(), {name, fatbin}, C.threads(), sizeof(DecodeSmem<C>)};
}

template <BwdConfig C>
constexpr BwdKernel bwd_kernel(const char* name, const void* fatbin) {
  static_assert(sizeof(BwdSmemPlan<C>) <= kMaxSharedBytes);
  return {C, C.tile(), {name, fatbin}, C.threads(), sizeof(BwdSmemPlan<C>)};
}

#define FLASH_KERNEL(name, ...) fwd_kernel<__VA_ARGS__>(#name, name##_fatbin),
constexpr FwdKernel fwd_kernels[] = {
#include "generated/hopper_fwd.inc"
};
#undef FLASH_KERNEL

#define FLASH_KERNEL(name, ...) decode_kernel<__VA_ARGS__>(#name, name##_fatbin),
constexpr DecodeKernel decode_kernels[] = {
#include "generated/hopper_decode.inc"
};
#undef FLASH_KERNEL

#define FLASH_KERNEL(name, ...) bwd_kernel<__VA_ARGS__>(#name, name##_fatbin),
constexpr BwdKernel bwd_kernels[] = {
#include "generated/hopper_bwd.inc"
};
#undef FLASH_KERNEL

#define FLASH_KERNEL(name, ...) cuda::RowKernel{__VA_ARGS__, {#name, name##_fatbin}},
constexpr cuda::RowKernel bwd_prepare_kernels[] = {
#include "generated/hopper_bwd_prepare.inc"
};
#undef FLASH_KERNEL

}  // namespace

const std::span<const FwdKernel> kFwdKernels = fwd_kernels;
const std::span<const DecodeKernel> kDecodeKernels = decode_kernels;
const std::span<const BwdKernel> kBwdKernels = bwd_kernels;
const std::span<const cuda::RowKernel> kBwdPrepareKernels = bwd_prepare_kernels;

}  // namespace flash::hopper
