// The CUDA kernels as the rest of the library sees them.
#pragma once

#include "base/target.h"
#include "xentropy/params.h"

namespace flash::xentropy::sm80 {

// Enqueue their work into the target's stream. Throw ApiError.
void fwd(const Params& params, const Target& target);
void bwd(const Params& params, const Target& target);

}  // namespace flash::xentropy::sm80
