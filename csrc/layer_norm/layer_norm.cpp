// The C interface: check, choose where to run, run.
#include "flash_attn/layer_norm.h"

#include "base/call/guarded.h"
#include "base/call/target.h"
#include "base/cpu/isa_units.h"
#include "layer_norm/check.h"
#include "layer_norm/cpu/kernels.h"

namespace flash::layer_norm {
namespace {

template <class Params>
void run_on_cpu(const Params& p, void (*cpu::Kernels::*kernel)(const Params&)) {
  check_subsets(p);
  (FLASH_CURRENT_UNIT(cpu::kernels).*kernel)(p);
}

void no_cuda() { throw ApiError(FLASH_ATTN_UNSUPPORTED, "layer norm has no CUDA kernels"); }

}  // namespace
}  // namespace flash::layer_norm

using flash::Target;
using flash::layer_norm::cpu::Kernels;

flash_attn_status flash_attn_layer_norm_fwd(const flash_attn_layer_norm_fwd_args* args) {
  return flash::guarded([&] {
    flash::require_pointer(args, "args");
    const flash::layer_norm::FwdParams p = flash::layer_norm::check(*args);
    const Target target = flash::target_of(*args->x0, args->stream);
    if (target.device_type == FLASH_ATTN_CPU)
      return flash::layer_norm::run_on_cpu(p, &Kernels::fwd);
    flash::layer_norm::no_cuda();
  });
}

flash_attn_status flash_attn_layer_norm_bwd(const flash_attn_layer_norm_bwd_args* args) {
  return flash::guarded([&] {
    flash::require_pointer(args, "args");
    const flash::layer_norm::BwdParams p = flash::layer_norm::check(*args);
    const Target target = flash::target_of(*args->x, args->stream);
    if (target.device_type == FLASH_ATTN_CPU)
      return flash::layer_norm::run_on_cpu(p, &Kernels::bwd);
    flash::layer_norm::no_cuda();
  });
}

flash_attn_status flash_attn_layer_norm_bwd_workspace_size(
    const flash_attn_layer_norm_bwd_args* args, size_t* bytes) {
  return flash::guarded([&] {
    flash::require_pointer(args, "args");
    flash::require_pointer(bytes, "bytes");
    *bytes = 0;
  });
}
