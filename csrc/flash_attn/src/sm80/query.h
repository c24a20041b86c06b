// What happens to a tile of Q in shared memory before the first product.
#pragma once

#include "base/ptx/elements.h"
#include "common/flash.h"
#include "warp/negate_q.h"
#include "warp/rotary.h"
#include "warp/smem_tile.h"

namespace flash::sm80 {

using ptx::from_float;
using ptx::to_float;

}  // namespace flash::sm80
