// The warps that bring tiles into shared memory: one that finds tiles and copies, by TMA, and those
// that look through V.
#pragma once

#include "base/ptx/tma.h"
#include "common/block_range.h"
#include "hopper/factors.h"
#include "hopper/fwd_params.h"
#include "hopper/inspect.h"
#include "hopper/named_barrier.h"
#include "hopper/pipeline.h"
#include "hopper/smem.h"
#include "hopper/tile_scheduler.h"
#include "hopper/transpose_v.h"
#include "warp/warp_tile.h"

namespace flash::hopper {

// The blocks of keys that any query of a tile sees.
template <FwdConfig C>
FLASH_DEVICE BlockRange blocks_of(const FwdParams& p, const WorkTile& tile) {
  const int first = tile.place.m_block * C.m();
  return block_range(mask_of(p, tile.sequence), first, first + C.m() - 1, C.n());
}

// The producer warp's copies of tiles.
template <FwdConfig C>
class Loader {
 public:
  FLASH_DEVICE Loader(const FwdParams& p, const FwdLaunch& launch, SmemPlan<C>& smem)
      : p_(p), launch_(launch), smem_(smem) {}

  FLASH_DEVICE void load(const WorkTile& tile, const BlockRange& blocks) {
    const Sequence& seq = tile.sequence;
    fill<typename Plan::Q, 1>(
        smem_.q_barriers, q_, smem_.q[q_.slot()], launch_.q, C.m(),
        [&](int row) {
          return ptx::BoxPlace{0, static_cast<int>(seq.q_row) + tile.place.m_block * C.m() + row,
                               tile.head, launch_.is_packed ? 0 : tile.place.batch};
        },
        [] {});
    q_.advance();
    for (int block = blocks.end - 1; block >= blocks.begin; --block) {
      const auto place = [&](int row) { return place_of_key(tile, block * C.n() + row); };
      const auto note = [&](float& to, const Descale& factors) {
        if constexpr (C.is_fp8())
          to = factor_of(factors, tile.place.batch, tile.head / launch_.group, block);
      };
      fill<typename Plan::K, C.cluster()>(smem_.k_barriers, kv_, smem_.k[kv_.slot()], launch_.k,
                                          launch_.box_keys, place,
                                          [&] { note(smem_.k_factors[kv_.slot()], p_.k_descale); });
      fill<typename Plan::V, C.cluster()>(smem_.v_barriers, kv_, smem_.v[kv_.slot()], launch_.v,
                                          launch_.box_keys, place,
                                          [&] { note(smem_.v_factors[kv_.slot()], p_.v_descale); });
      kv_.advance();
    }
  }

  // A tile without keys, whose output goes to Q's place.
  FLASH_DEVICE void leave_q_empty() {
    wait_empty(smem_.q_barriers, q_);
    if (lane() == 0) ptx::mbarrier_arrive(full(smem_.q_barriers, q_));
    q_.advance();
  }

 private:
  using Plan = SmemPlan<C>;

  FLASH_DEVICE static int lane() { return ptx::read_tid_x() % 32; }

  // Where a box of keys begins. A page that is not there lies outside the tensor, and so do keys
  // behind a sequence's last in pages that the table need not have: TMA makes them zeros.
  FLASH_DEVICE ptx::BoxPlace place_of_key(const WorkTile& tile, int key) const {
    const Sequence& seq = tile.sequence;
    const int head_k = tile.head / launch_.group;
    if (p_.block_table == nullptr)
      return {0, static_cast<int>(seq.k_row) + seq.leftpad + key, head_k,
              static_cast<int>(seq.k_batch)};
    if (key >= seq.seqlen_k) return {0, 0, head_k, -1};
    const int index = launch_.page_size.quotient(key);
    return {0, key - index * launch_.page_size.divisor, head_k, seq.pages[index]};
  }

  // A slot of a ring, of a tile's rows and groups of columns in boxes, one lane for each `box`
  // rows, so that lanes look up their pages side by side. In each CTA of a cluster, of which this
  // one loads its share of the rows. place_of(row) is the place of row `row` of the tile; what
  // note() writes, by one lane, those see who wait for the slot.
  template <class Smem, int kCluster, int kSlots, class PlaceOf, class Note>
  FLASH_DEVICE void fill(RingBarriers<kSlots>& barriers, const RingPosition<kSlots>& position,
                         char* slot, const CUtensorMap& map, int box, const PlaceOf& place_of,
                         const Note& note) {
    constexpr int kRows = Smem::kGroupBytes / Smem::kRowBytes / kCluster;
    const int first = kCluster > 1 ? ptx::read_cluster_ctarank() * kRows : 0;
    const uint32_t barrier = full(barriers, position);
    wait_empty(barriers, position);
    // Bytes may come before they are announced: without this arrival no phase ends.
    if (lane() == 0) {
      note();
      ptx::mbarrier_arrive_expect_tx(barrier, Smem::kBytes);
    }
    for (int row = first + lane() * box; row < first + kRows; row += 32 * box) {
      ptx::BoxPlace at = place_of(row);
      const uint32_t shared = ptx::shared_address(slot) + row * Smem::kRowBytes;
#pragma unroll
      for (int g = 0; g < Smem::kGroups; ++g) {
        at.column = g * Smem::kGroupCols;
        if constexpr (kCluster > 1) {
          ptx::tma_load_multicast(shared + g * Smem::kGroupBytes, map, at, barrier,
                                  (1 << kCluster) - 1);
        } else {
          ptx::tma_load(shared + g * Smem::kGroupBytes, map, at, barrier);
        }
      }
    }
  }

  const FwdParams& p_;
  const FwdLaunch& launch_;
  SmemPlan<C>& smem_;
  RingPosition<Plan::kTile.q_stages> q_;
  RingPosition<Plan::kTile.stages> kv_;
};

// The first tile of each sequence looks for pages that do not exist.
FLASH_DEVICE void check_pages(const FwdParams& p, const FwdLaunch& launch, const WorkTile& tile) {
  if (tile.sequence.pages == nullptr || tile.place.m_block != 0 || tile.head != 0) return;
  const IndexFaults faults = page_faults(tile.sequence, launch.page_size, p.k_entries, 32);
  if (faults != 0) report(launch.bounds, faults);
}

// The producer warp.
template <FwdConfig C>
FLASH_DEVICE void produce(const FwdParams& p, const FwdLaunch& launch, SmemPlan<C>& smem) {
  const bool is_first_lane = ptx::read_tid_x() % 32 == 0;
  const int tiles = static_cast<int>(launch.scheduler.tiles());
  RingPosition<kTileSlots> position;
  Loader<C> loader(p, launch, smem);
  if (is_first_lane) {
    ptx::prefetch_tensor_map(launch.q);
    ptx::prefetch_tensor_map(launch.k);
    ptx::prefetch_tensor_map(launch.v);
  }
  const auto hand_on = [&](const WorkTile& tile) {
    wait_empty(smem.tile_barriers, position);
    if (is_first_lane) {
      smem.tiles[position.slot()] = tile;
      ptx::mbarrier_arrive(full(smem.tile_barriers, position));
    }
    position.advance();
  };
  for (TileNumbers<C> numbers(launch); numbers.number() < tiles; numbers.advance()) {
    WorkTile tile = find_tile<C>(p, launch, numbers.number());
    if (is_empty<C>(p, tile)) continue;
    if constexpr (C.is_fp8()) set_scale(p, launch, tile);
    hand_on(tile);
    check_pages(p, launch, tile);
    const BlockRange blocks = blocks_of<C>(p, tile);
    if (blocks.begin < blocks.end) {
      loader.load(tile, blocks);
    } else if (!C.tile().o_apart && tile.place.batch < p.b) {
      loader.leave_q_empty();
    }
  }
  WorkTile last{};
  last.is_last = true;
  hand_on(last);
}

// A warp that looks through the blocks of V that a mask cuts, before they are multiplied: a hidden
// key's probability is 0, and 0 times NaN must not reach the rows that do not see it. Blocks of
// e4m3 it also transposes, all of them. Warp `inspector` of kInspectors.
template <FwdConfig C>
FLASH_DEVICE void inspect(const FwdParams& p, const FwdLaunch& launch, SmemPlan<C>& smem,
                          int inspector) {
  using V = typename SmemPlan<C>::V;
  constexpr int kThreads = 32 * kInspectors;
  const int thread = inspector * 32 + ptx::read_tid_x() % 32;
  RingPosition<kTileSlots> tiles;
  RingPosition<SmemPlan<C>::kTile.stages> position;
  for (;;) {
    wait_full(smem.tile_barriers, tiles);
    const WorkTile& tile = smem.tiles[tiles.slot()];
    if (tile.is_last) return;
    const BlockRange blocks = tile.place.batch < p.b ? blocks_of<C>(p, tile) : BlockRange{};
    const int keys = tile.sequence.seqlen_k;
    __syncwarp();
    leave(smem.tile_barriers, tiles);
    tiles.advance();
    for (int block = blocks.end - 1; block >= blocks.begin; --block) {
      wait_full(smem.v_barriers, position);
      const uint32_t slot = ptx::shared_address(smem.v[position.slot()]);
      if (launch.inspects_v && !blocks.is_full(block)) {
        const int rows = min(keys - block * C.n(), C.n());
        const bool is_masked = p.window_left >= 0 || p.window_right >= 0;
        const bool is_finite =
            !is_masked || is_finite_share<C.dtype, V, kThreads>(slot, rows, thread);
        if (launch.rows_end_inside && rows < C.n()) {
          clear_rows_behind<V, kThreads>(slot, rows, C.n(), thread);
          ptx::fence_proxy_async();
        }
        if (ptx::read_tid_x() % 32 == 0) smem.not_finite[position.slot()][inspector] = !is_finite;
        if constexpr (C.is_fp8()) {
          inspectors_barrier();  // all of them have
        } else {
          __syncwarp();  // lanes have read the slot, and written to it
        }
      }
      if constexpr (C.is_fp8()) {
        transpose_v<C>(smem.v[position.slot()], inspector);
        ptx::fence_proxy_async();
        __syncwarp();
      }
      arrive_as_warp(ptx::shared_address(&smem.inspected[position.slot()]));
      leave(smem.v_barriers, position);
      position.advance();
    }
  }
}

}  // namespace flash::hopper
