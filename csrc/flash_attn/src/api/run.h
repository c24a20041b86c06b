// Running a kernel on a checked call.
#pragma once

#include "api/select_kernel.h"
#include "api/tensors.h"
#include "base/call/target.h"

namespace flash {

// What a kernel needs for a call.
inline size_t workspace_bytes(const Kernel& kernel, const Flash_fwd_params& p) {
  return kernel.fwd_workspace_bytes == nullptr ? 0 : kernel.fwd_workspace_bytes(p);
}
inline size_t workspace_bytes(const Kernel& kernel, const Flash_bwd_params& p) {
  return kernel.bwd_workspace_bytes == nullptr ? 0 : kernel.bwd_workspace_bytes(p);
}

// The caller's workspace, as much of it as the kernel has asked for.
template <typename Args>
Workspace workspace_of(const Args& args, size_t needed) {
  if (needed == 0) return {};
  require(args.workspace != nullptr && args.workspace_bytes >= needed, "workspace must have ",
          needed, " bytes, got ", args.workspace == nullptr ? 0 : args.workspace_bytes);
  return {args.workspace, needed};
}

inline void launch(const Kernel& kernel, const Flash_fwd_params& p) { kernel.mha_fwd(p); }
inline void launch(const Kernel& kernel, const Flash_bwd_params& p) { kernel.mha_bwd(p); }
inline void launch(const Kernel& kernel, const Combine_params& p) { kernel.combine(p); }

// Runs `kernel` on p.target with the caller's workspace. Throws ApiError if that is too small.
template <typename Args, typename Params>
void run(const Kernel& kernel, const Args& args, Params& p) {
  Workspace workspace;
  if constexpr (requires { args.workspace; }) {
    workspace = p.workspace = workspace_of(args, workspace_bytes(kernel, p));
  }
  if (!p.target.is_emulated) return launch(kernel, p);
  run_emulated(p.target, written_by(args), read_by(args), workspace, [&] { launch(kernel, p); });
}

}  // namespace flash
