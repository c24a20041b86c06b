// Where a warpgroup's rows of a tile are.
#pragma once

#include "base/ptx/special_registers.h"
#include "common/block_range.h"
#include "hopper/fwd_params.h"
#include "hopper/smem.h"

namespace flash::hopper {

// It lies in shared memory and is read again where it is needed: registers are short.
template <FwdConfig C>
class Place {
 public:
  FLASH_DEVICE Place(const FwdParams& p, const WorkTile& tile, int warpgroup)
      : p_(p), tile_(tile), warpgroup_(warpgroup) {}

  FLASH_DEVICE const Sequence& sequence() const { return tile_.sequence; }
  FLASH_DEVICE int batch() const { return tile_.place.batch; }
  FLASH_DEVICE int head() const { return tile_.head; }
  FLASH_DEVICE Mask mask() const { return mask_of(p_, tile_.sequence); }

  // Of scores, as AttentionLaunch has them.
  FLASH_DEVICE float scale(const FwdLaunch& launch) const {
    return C.is_fp8() ? tile_.scale : launch.scale;
  }
  FLASH_DEVICE float scale_log2(const FwdLaunch& launch) const {
    return C.is_fp8() ? tile_.scale_log2 : launch.scale_log2;
  }
  FLASH_DEVICE bool negates_q(const FwdLaunch& launch) const {
    return C.is_fp8() ? tile_.negate_q : launch.negate_q;
  }

  FLASH_DEVICE float factor() const { return tile_.factor; }

  // First queries: of the CTA, of this warpgroup, of this warp.
  FLASH_DEVICE int cta_row() const { return tile_.place.m_block * C.m(); }
  FLASH_DEVICE int row() const { return cta_row() + warpgroup_ * kWarpgroupRows; }
  FLASH_DEVICE int warp_row() const { return row() + ptx::read_tid_x() / 32 % 4 * 16; }

  // The blocks of keys that they see.
  FLASH_DEVICE BlockRange cta_blocks() const {
    return block_range(mask(), cta_row(), cta_row() + C.m() - 1, C.n());
  }
  FLASH_DEVICE BlockRange blocks() const {
    return block_range(mask(), row(), row() + kWarpgroupRows - 1, C.n());
  }

 private:
  const FwdParams& p_;
  const WorkTile& tile_;
  int warpgroup_;
};

}  // namespace flash::hopper
