// Global to shared memory in the decode kernel: each warp fetches its own keys and values.
#pragma once

#include "common/block_range.h"
#include "sm80/decode_params.h"
#include "sm80/decode_smem.h"
#include "sm80/pipeline.h"
#include "warp/decode_place.h"
#include "warp/row_loader.h"

namespace flash::sm80 {

// A warp's keys and values on their way through its ring. K and V take turns, from the first block
// to the last; a step reads one slot and fetches what is read kStages - 1 steps later.
template <DecodeConfig C>
class WarpBlocks {
 public:
  struct Source {
    KeyRows k, v;
    PageTable pages;
    int seqlen_k;
    int first_key;             // of this warp's keys of block 0
    int seen_begin, seen_end;  // keys that a row sees
  };

  FLASH_DEVICE WarpBlocks(const Source& source, uint32_t ring, unsigned lane, int first_block,
                          int end_block)
      : k_(source.k, lane),
        v_(source.v, lane),
        pages_(source.pages),
        seqlen_k_(source.seqlen_k),
        first_key_(source.first_key),
        seen_begin_(source.seen_begin),
        seen_end_(source.seen_end),
        ring_(ring),
        end_block_(end_block) {
    // Not unrolled: the code of the copies is long.
#pragma unroll 1
    for (int step = 0; step < kStages - 1; ++step) {
      const int block = first_block + step / 2;
      if (step % 2 == 0) {
        fetch(k_, block, step);
      } else {
        fetch(v_, block, step);
      }
    }
  }

  FLASH_DEVICE int key(int block) const { return first_key_ + block * C.block_keys(); }
  // Whether some row sees some of this warp's keys of a block.
  FLASH_DEVICE bool is_seen(int block) const {
    return key(block) < seen_end_ && key(block) + kTile.n > seen_begin_;
  }

  // Begins a step over K, or V, of `block`: its slot is full, the one of the step before is free.
  // Returns the slot's address.
  FLASH_DEVICE uint32_t next_k(int block) {
    wait();
    if constexpr (kStages % 2 == 0) {
      fetch(v_, block + kStages / 2 - 1, pipe_.freed());
    } else {
      fetch(k_, block + kStages / 2, pipe_.freed());
    }
    return take();
  }
  FLASH_DEVICE uint32_t next_v(int block) {
    wait();
    if constexpr (kStages % 2 == 0) {
      fetch(k_, block + kStages / 2, pipe_.freed());
    } else {
      fetch(v_, block + kStages / 2, pipe_.freed());
    }
    return take();
  }

 private:
  static constexpr DecodeTile kTile = C.tile();
  static constexpr int kStages = kTile.stages;
  using Plan = SmemPlan<C>;

  // Lanes wait for their own copies, then for each other's.
  FLASH_DEVICE static void wait() {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncwarp();
  }

  FLASH_DEVICE uint32_t take() {
    const uint32_t slot = ring_ + pipe_.slot * Plan::kSlotBytes;
    pipe_.advance();
    return slot;
  }

  // Always a group of copies, maybe empty, so that the number of groups under way tells which have
  // landed.
  template <class Loader>
  FLASH_DEVICE void fetch(const Loader& loader, int block, int slot) const {
    if (block < end_block_ && is_seen(block))
      loader.copy(ring_ + slot * Plan::kSlotBytes, key(block), seqlen_k_ - key(block), pages_);
    ptx::cp_async_commit_group();
  }

  WarpLoader<typename Plan::K, kTile.n> k_;
  WarpLoader<typename Plan::V, kTile.n> v_;
  PageTable pages_;
  int seqlen_k_, first_key_, seen_begin_, seen_end_;
  uint32_t ring_;
  int end_block_;
  PipeState<kStages> pipe_;
};

}  // namespace flash::sm80
