// S_dmask's blocks of keys.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace flash {

// Keys of a block: that of the reference package with dropout
// (flash_attn_interface._get_block_size_n).
FLASH_INLINE int dmask_block_keys(int64_t d) {
  if (d <= 32) return 128;
  if (d <= 96) return 64;
  return d <= 128 ? 32 : 64;
}

}  // namespace flash
