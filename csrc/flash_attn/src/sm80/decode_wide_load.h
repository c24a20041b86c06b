// Global to shared memory where the warps of a decode CTA share keys.
#pragma once

#include "sm80/pipeline.h"
#include "warp/decode_place.h"
#include "warp/load.h"

namespace flash::sm80 {

// Blocks of keys and values on their way through the CTA's ring. K and V take turns, from the first
// block to the last (pipeline.h); where V's rows are the first columns of K's, a block is fetched
// once, as K, and serves for both.
template <DecodeConfig C>
class SharedBlocks {
 public:
  FLASH_DEVICE SharedBlocks(const FwdParams& p, const DecodeLaunch& launch,
                            const DecodePlace<C>& here, const KeyUnits<C>& units, uint32_t ring)
      : p_(p),
        launch_(launch),
        k_(here.first_key_row(p.k), here.seq.seqlen_k, static_cast<int>(p.d)),
        v_(here.first_key_row(p.v), here.seq.seqlen_k, static_cast<int>(p.d_v)),
        pages_(here.seq.pages),
        leftpad_(here.seq.leftpad),
        first_key_(units.first_key),
        end_block_(units.end_block(units.mine.end - 1)),
        ring_(ring) {
    const int block = units.mine.begin * units.blocks_of_unit;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      if (launch.v_within_k) {
        fetch_k(block + step, step);
      } else if (step % 2 == 0) {
        fetch_k(block + step / 2, step);
      } else {
        fetch_v(block + step / 2, step);
      }
    }
  }

  FLASH_DEVICE int key(int block) const { return first_key_ + block * kTile.n; }

  // Begins the steps over `block`, over its K: the slot is full, and all warps have left the one
  // that was read before. Returns the slot's address.
  FLASH_DEVICE uint32_t next_k(int block) {
    wait();
    fetch_k(block + (launch_.v_within_k ? kSteps : kSteps / 2), pipe_.freed());
    return take();
  }
  // The same over its V; what warps have stored during the step over K can be read. `sK`: what
  // next_k has returned.
  FLASH_DEVICE uint32_t next_v(int block, uint32_t sK) {
    if (launch_.v_within_k) {
      __syncthreads();
      return sK;
    }
    wait();
    fetch_v(block + kSteps / 2, pipe_.freed());
    return take();
  }

 private:
  static constexpr DecodeTile kTile = C.tile();
  static constexpr int kSteps = kTile.stages - 1;  // that are under way
  using Plan = SmemPlan<C>;

  FLASH_DEVICE static void wait() {
    ptx::cp_async_wait_group<kTile.stages - 2>();
    __syncthreads();
  }

  FLASH_DEVICE uint32_t take() {
    const uint32_t slot = ring_ + pipe_.slot * Plan::kSlotBytes;
    pipe_.advance();
    return slot;
  }

  // Always a group of copies, maybe empty, so that the number of groups under way tells which have
  // landed.
  FLASH_DEVICE void fetch_k(int block, int slot) const {
    if (block < end_block_) copy(k_, p_.k, launch_.k_aligned, block, slot);
    ptx::cp_async_commit_group();
  }
  FLASH_DEVICE void fetch_v(int block, int slot) const {
    if (block < end_block_) copy(v_, p_.v, launch_.v_aligned, block, slot);
    ptx::cp_async_commit_group();
  }

  template <class Loader>
  FLASH_DEVICE void copy(const Loader& loader, const Operand& x, bool aligned, int block,
                         int slot) const {
    const uint32_t shared = ring_ + slot * Plan::kSlotBytes;
    const int64_t row_bytes = x.row_stride * kElementBytes;
    if (pages_ == nullptr) {
      loader.copy(shared, key(block), row_bytes, aligned);
    } else {
      loader.copy(shared, key(block), row_bytes, aligned,
                  {pages_, static_cast<int>(p_.k_entries), leftpad_, launch_.page_size},
                  x.batch_stride * kElementBytes);
    }
  }

  const FwdParams& p_;
  const DecodeLaunch& launch_;
  const TileLoader<typename Plan::K, kTile.n, C.threads()> k_;
  const TileLoader<typename Plan::V, kTile.n, C.threads()> v_;
  const int32_t* pages_;
  int leftpad_, first_key_, end_block_;
  uint32_t ring_;
  PipeState<kTile.stages> pipe_;
};

}  // namespace flash::sm80
