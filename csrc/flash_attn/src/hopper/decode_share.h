// What the warpgroups of a decode CTA that share a block of keys tell each other.
//
// Each multiplies Q with its slot of the block, and probabilities of all slots with its columns of
// V. Warp w of each has the same rows, in the same lanes: so it is pairs of warps that meet, at a
// barrier of their own, and a lane gives its registers to the same lane of the other.
#pragma once

#include "base/ptx/fragments.h"
#include "base/ptx/special_registers.h"
#include "base/ptx/warpgroup.h"
#include "hopper/decode_smem.h"
#include "warp/warp_tile.h"

namespace flash::hopper {

// Barrier 0 is __syncthreads.
enum class DecodeBarrier : int {
  kConsumers = 1,  // all that multiply
  kPair = 2,       // one for each warp of a warpgroup
};

template <DecodeConfig C>
FLASH_DEVICE void consumer_barrier() {
  ptx::bar_sync(static_cast<int>(DecodeBarrier::kConsumers), C.consumers());
}

template <DecodeConfig C>
class WarpgroupShare {
 public:
  using Probabilities = typename WarpTile<C>::Probabilities;

  // `warp` counts over the warpgroups; known to be uniform.
  FLASH_DEVICE WarpgroupShare(DecodeExchange<C.tile().warpgroups>& exchange, int warp)
      : exchange_(exchange), warpgroup_(warp / 4), warp_(warp % 4) {}

  // x: what this lane's rows have, the same in the four lanes of a row; becomes the larger, or the
  // sum, of the warpgroups'.
  FLASH_DEVICE void maximum(float (&x)[2]) const {
    combine(x, 0, [](float a, float b) { return fmaxf(a, b); });
  }
  FLASH_DEVICE void add(float (&x)[2]) const {
    combine(x, 1, [](float a, float b) { return a + b; });
  }

  // Puts the probabilities of each slot in its place; this warpgroup's are in the first.
  FLASH_DEVICE void gather(Probabilities (&rP)[C.tile().warpgroups]) const {
    if constexpr (kShares) {
      static_assert(WarpTile<C>::kS == 4);
      const int thread = ptx::read_tid_x() % kWarpgroupThreads;
      auto(&mine)[4][2] = rP[0][0];
      auto(&other)[4][2] = rP[1][0];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        ptx::store_shared(
            place(warpgroup_, i, thread),
            uint4{mine[2 * i][0], mine[2 * i][1], mine[2 * i + 1][0], mine[2 * i + 1][1]});
      pair_barrier();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 x = ptx::load_shared_16_bytes(place(1 - warpgroup_, i, thread));
        other[2 * i][0] = x.x;
        other[2 * i][1] = x.y;
        other[2 * i + 1][0] = x.z;
        other[2 * i + 1][1] = x.w;
      }
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t a = mine[n][half], b = other[n][half];
          mine[n][half] = warpgroup_ == 0 ? a : b;
          other[n][half] = warpgroup_ == 0 ? b : a;
        }
    }
  }

 private:
  static constexpr bool kShares = C.tile().warpgroups > 1;
  static_assert(C.tile().warpgroups <= 2);

  FLASH_DEVICE void pair_barrier() const {
    ptx::bar_sync(static_cast<int>(DecodeBarrier::kPair) + warp_, 64);
  }
  FLASH_DEVICE uint32_t place(int warpgroup, int i, int thread) const {
    return ptx::shared_address(exchange_.probabilities[warpgroup][i][thread]);
  }

  // f(the first warpgroup's, the second's): the same bits in both. Maxima, probabilities and sums
  // have places of their own, and between two exchanges of a kind there is one of another, whose
  // barrier keeps what is read of the first from what is written of the second.
  template <class F>
  FLASH_DEVICE void combine(float (&x)[2], int kind, const F& f) const {
    if constexpr (kShares) {
      const int lane = ptx::read_tid_x() % 32;
      float* const rows = &exchange_.rows[kind][0][warp_ * 16 + lane / 4];
      if (lane % 4 == 0) {
        rows[warpgroup_ * kWarpgroupRows] = x[0];
        rows[warpgroup_ * kWarpgroupRows + 8] = x[1];
      }
      pair_barrier();
      x[0] = f(rows[0], rows[kWarpgroupRows]);
      x[1] = f(rows[8], rows[kWarpgroupRows + 8]);
    }
  }

  DecodeExchange<C.tile().warpgroups>& exchange_;
  const int warpgroup_, warp_;
};

}  // namespace flash::hopper
