// The C interface: check, choose where to run, run.
#include "flash_attn/layer_norm.h"

#include "base/call/guarded.h"
#include "base/call/target.h"
#include "base/cpu/isa_units.h"
#include "layer_norm/check.h"
#include "layer_norm/cpu/kernels.h"
#if defined(FLASH_ATTN_HAVE_CUDA)
#include "layer_norm/sm80/launch.h"
#endif

namespace flash::layer_norm {
namespace {

#if defined(FLASH_ATTN_HAVE_CUDA)
constexpr auto kCudaFwd = sm80::fwd;
constexpr auto kCudaBwd = sm80::bwd;
constexpr auto kWorkspaceBytes = sm80::workspace_bytes;
#else
constexpr void (*kCudaFwd)(const FwdParams&, const Workspace&, const Target&) = nullptr;
constexpr void (*kCudaBwd)(const BwdParams&, const Workspace&, const Target&) = nullptr;
constexpr size_t (*kWorkspaceBytes)(const BwdParams&) = nullptr;
#endif

template <class Args, class Params>
void run(const Args& args, const flash_attn_tensor* x, const Workspace& workspace,
         void (*cpu::Kernels::*on_cpu)(const Params&),
         void (*on_cuda)(const Params&, const Workspace&, const Target&)) {
  const Params p = check(args);
  const Target target = target_of(*x, args.stream);
  if (target.device_type == FLASH_ATTN_CPU) {
    check_subsets(p);
    return (FLASH_CURRENT_UNIT(cpu::kernels).*on_cpu)(p);
  }
  require_cuda_kernels(target);
  run_kernels(target, written_by(args), read_by(args), workspace,
              [&] { on_cuda(p, workspace, target); });
}

size_t workspace_bytes(const flash_attn_layer_norm_bwd_args& args) {
  const BwdParams p = check(args);
  const Target target = target_of(*args.x, args.stream);
  if (target.device_type == FLASH_ATTN_CPU) return 0;
  require_cuda_kernels(target);
  return kWorkspaceBytes(p);
}

}  // namespace
}  // namespace flash::layer_norm

using flash::layer_norm::cpu::Kernels;

flash_attn_status flash_attn_layer_norm_fwd(const flash_attn_layer_norm_fwd_args* args) {
  return flash::guarded([&] {
    flash::require_pointer(args, "args");
    flash::layer_norm::run(*args, args->x0, {}, &Kernels::fwd, flash::layer_norm::kCudaFwd);
  });
}

flash_attn_status flash_attn_layer_norm_bwd(const flash_attn_layer_norm_bwd_args* args) {
  return flash::guarded([&] {
    flash::require_pointer(args, "args");
    flash::layer_norm::run(*args, args->x, {args->workspace, args->workspace_bytes}, &Kernels::bwd,
                           flash::layer_norm::kCudaBwd);
  });
}

flash_attn_status flash_attn_layer_norm_bwd_workspace_size(
    const flash_attn_layer_norm_bwd_args* args, size_t* bytes) {
  return flash::guarded([&] {
    flash::require_pointer(args, "args");
    flash::require_pointer(bytes, "bytes");
    *bytes = flash::layer_norm::workspace_bytes(*args);
  });
}
