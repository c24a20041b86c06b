// Which sequence of a packed batch a tile of queries belongs to, found by a warp: no kernel before,
// no host that waits.
#pragma once

#include "base/ptx/special_registers.h"
#include "common/seqlen.h"
#include "warp/packed_tiles.h"

namespace flash {

// Tile `number` of `tiles`. Lengths that cannot be count as 0.
template <int kM>
FLASH_DEVICE PackedTile packed_tile(const int32_t* cu_seqlens, int64_t longest, int b, int number,
                                    int tiles) {
  constexpr int kEach = 4;  // sequences of a lane at a time: loads that wait together
  const int lane = ptx::read_tid_x() % 32;
  for (int start = 0; start < b; start += 32 * kEach) {
    const int first = start + lane * kEach;
    int through[kEach], total = 0;  // tiles up to and with each of them
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int batch = first + i;
      if (batch < b) {
        const int length = length_of(cu_seqlens, batch);
        total += 0 < length && length <= longest ? (length + kM - 1) / kM : 1;
      }
      through[i] = total;
    }
    int sum = total;  // with those of the lanes before
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    const unsigned found = __ballot_sync(0xffffffffu, number < sum);
    if (found != 0) {
      const int rest = number - (sum - total);
      int i = 0, before = 0;
#pragma unroll
      for (int j = 0; j + 1 < kEach; ++j) {
        if (rest >= through[j]) {
          i = j + 1;
          before = through[j];
        }
      }
      const int source = __ffs(static_cast<int>(found)) - 1;
      return {__shfl_sync(0xffffffffu, first + i, source),
              __shfl_sync(0xffffffffu, rest - before, source), 0};
    }
    const int all = __shfl_sync(0xffffffffu, sum, 31);
    number -= all;
    tiles -= all;
  }
  return {b, number, tiles};
}

}  // namespace flash
