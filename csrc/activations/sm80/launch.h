// The CUDA kernels as the rest of the library sees them.
#pragma once

#include "activations/params.h"
#include "base/target.h"

namespace flash::activations::sm80 {

// Enqueue their work into the target's stream. Throw ApiError.
void fwd(const Params& params, const Target& target, const Workspace& workspace);
void bwd(const Params& params, const Target& target, const Workspace& workspace);

// What bwd needs.
size_t workspace_bytes(const Params& params);

}  // namespace flash::activations::sm80
