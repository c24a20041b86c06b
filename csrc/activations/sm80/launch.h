// The CUDA kernels as the rest of the library sees them.
#pragma once

#include "activations/params.h"
#include "base/target.h"

namespace flash::activations::sm80 {

// Enqueue their work into the target's stream. Throw ApiError.
void fwd(const Params& params, const Target& target);
void bwd(const Params& params, const Target& target);

}  // namespace flash::activations::sm80
