// The barriers of a CTA that some of its warps wait at.
#pragma once

#include "base/ptx/warpgroup.h"
#include "hopper/smem.h"

namespace flash::hopper {

// Barrier 0 is __syncthreads.
enum class NamedBarrier : int {
  kTurn = 1,       // one for each warpgroup that multiplies: it is its turn
  kWarpgroup = 4,  // one for each of them: its own warps
  kInspectors = 7,
};

// The warpgroups' turns at what only one of them shall do at a time. The first turn is the first
// warpgroup's; all take equally many, and give each up before the next.
template <FwdConfig C>
class Turns {
 public:
  FLASH_DEVICE explicit Turns(int warpgroup) : warpgroup_(warpgroup) {
    if (warpgroup == kWarpgroups - 1) pass();
  }
  FLASH_DEVICE void wait() const { ptx::bar_sync(barrier(warpgroup_), 2 * kWarpgroupThreads); }
  FLASH_DEVICE void pass() const { pass(0); }
  // Not before two sums of exponentials are there, which are never negative: ptxas would leave most
  // of the exponentials for later.
  FLASH_DEVICE void pass_behind(float x, float y) const {
    constexpr uint32_t kNever = 0x80000001u;
    pass((__float_as_uint(x) == kNever) + (__float_as_uint(y) == kNever));
  }

 private:
  FLASH_DEVICE void pass(int nothing) const {
    ptx::bar_arrive(barrier(warpgroup_ + 1 < kWarpgroups ? warpgroup_ + 1 : 0) + nothing,
                    2 * kWarpgroupThreads);
  }

  static constexpr int kWarpgroups = C.tile().warpgroups;
  FLASH_DEVICE static int barrier(int warpgroup) {
    return static_cast<int>(NamedBarrier::kTurn) + warpgroup;
  }
  int warpgroup_;
};

// Brings the warps that look through V together.
FLASH_DEVICE void inspectors_barrier() {
  ptx::bar_sync(static_cast<int>(NamedBarrier::kInspectors), 32 * kInspectors);
}

// Brings all threads of a warpgroup together.
FLASH_DEVICE void warpgroup_barrier(int warpgroup) {
  ptx::bar_sync(static_cast<int>(NamedBarrier::kWarpgroup) + warpgroup, kWarpgroupThreads);
}

}  // namespace flash::hopper
