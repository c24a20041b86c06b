// The CUDA kernels as the rest of the library sees them.
#pragma once

#include "base/target.h"
#include "rotary/params.h"

namespace flash::rotary::sm80 {

// Enqueues its work into the target's stream. Throws ApiError.
void turn(const Params& params, const Target& target);

}  // namespace flash::rotary::sm80
