// The CUDA kernels as the rest of the library sees them.
#pragma once

#include "base/target.h"
#include "layer_norm/params.h"

namespace flash::layer_norm::sm80 {

// Of the workspace that a backward needs.
size_t workspace_bytes(const BwdParams& params);

// Enqueue their work into the target's stream. Throw ApiError.
void fwd(const FwdParams& params, const Workspace& workspace, const Target& target);
void bwd(const BwdParams& params, const Workspace& workspace, const Target& target);

}  // namespace flash::layer_norm::sm80
