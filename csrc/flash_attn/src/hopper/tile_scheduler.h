// Which tile of queries a CTA takes next. CTAs stay, one on an SM, and take tile after tile: the
// producer finds out the next one, and whose it is, while the others are at work, and hands it on
// through shared memory.
#pragma once

#include "base/ptx/cluster.h"
#include "base/ptx/special_registers.h"
#include "common/bounded_sequence.h"
#include "hopper/fwd_params.h"
#include "hopper/smem.h"
#include "warp/packed_tile.h"
#include "warp/report.h"

namespace flash::hopper {

// What tile `number` is, found by a warp: lanes agree. Index tensors are checked here.
template <FwdConfig C>
FLASH_DEVICE WorkTile find_tile(const FwdParams& p, const FwdLaunch& launch, int number) {
  WorkTile found{};
  const Tile_coordinates at = launch.scheduler.tile(number);
  found.head = at.batch_head % launch.heads;
  found.place = {at.batch_head / launch.heads, at.m_block, 0};
  if constexpr (C.cluster() > 1)  // neighbouring tiles of a head for the CTAs of a cluster
    found.place.m_block = at.m_block * C.cluster() + ptx::read_cluster_ctarank();
  if (p.cu_seqlens_q != nullptr)
    found.place = packed_tile<C.m()>(p.cu_seqlens_q, p.seqlen_q, static_cast<int>(p.b), at.m_block,
                                     launch.scheduler.m_blocks);
  IndexFaults faults = 0;
  if (found.place.batch < p.b)
    found.sequence = bounded_sequence(p, found.place.batch, launch.bounds.max_cached, faults);
  if (faults != 0 && ptx::read_tid_x() % 32 == 0) report(launch.bounds, faults);
  return found;
}

// Whether nothing is to be written for it.
template <FwdConfig C>
FLASH_DEVICE bool is_empty(const FwdParams& p, const WorkTile& tile) {
  return tile.place.batch < p.b && tile.place.m_block * C.m() >= tile.sequence.seqlen_q;
}

// The numbers of the tiles of this CTA, or cluster, for a warp.
template <FwdConfig C>
class TileNumbers {
 public:
  FLASH_DEVICE explicit TileNumbers(const FwdLaunch& launch)
      : launch_(launch), number_(ptx::read_ctaid_x() / C.cluster()) {}

  FLASH_DEVICE int number() const { return number_; }

  // The next one is asked for here, and needed by the next call of number().
  FLASH_DEVICE void advance() {
    if (launch_.next_tile == nullptr) {
      number_ += gridDim.x / C.cluster();
      return;
    }
    int next = 0;
    if (ptx::read_tid_x() % 32 == 0)
      next = static_cast<int>(gridDim.x + atomicAdd(launch_.next_tile, 1u));
    number_ = __shfl_sync(0xffffffffu, next, 0);
  }

 private:
  const FwdLaunch& launch_;
  int number_;
};

}  // namespace flash::hopper
