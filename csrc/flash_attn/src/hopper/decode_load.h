// The warps that bring keys and values into shared memory: one by TMA, or, where keys are not whole
// boxes, four that copy row by row.
#pragma once

#include "base/ptx/cp_async.h"
#include "base/ptx/tma.h"
#include "hopper/decode_params.h"
#include "hopper/decode_smem.h"
#include "hopper/pipeline.h"
#include "warp/decode_place.h"
#include "warp/row_loader.h"

namespace flash::hopper {

inline constexpr int kCopyingWarps = 4;

// Arrivals that fill a slot: of the lane that starts the copies, or of all that copy.
FLASH_DEVICE int fills_of(const DecodeLaunch& launch) {
  return launch.box_keys > 0 ? 1 : 32 * kCopyingWarps;
}

// Boxes of keys, or of values.
template <DecodeConfig C, class Smem>
class BoxLoader {
 public:
  FLASH_DEVICE BoxLoader(const DecodeLaunch& launch, const DecodePlace<C>& here,
                         const CUtensorMap& map)
      : map_(map),
        page_size_(launch.page_size),
        pages_(here.seq.pages),
        box_(launch.box_keys),
        seqlen_k_(here.seq.seqlen_k),
        head_k_(here.head_k),
        batch_(static_cast<int>(here.seq.k_batch)),
        row_(static_cast<int>(here.seq.k_row) + here.seq.leftpad) {
    if (ptx::read_tid_x() % 32 == 0) ptx::prefetch_tensor_map(map);
  }

  // Keys from `key` on to the slot at `shared`. What lies behind the last becomes 0.
  FLASH_DEVICE void copy(uint32_t shared, int key, uint32_t barrier) const {
    const int lane = ptx::read_tid_x() % 32;
    // Bytes may come before they are announced: without this arrival no phase ends.
    if (lane == 0) ptx::mbarrier_arrive_expect_tx(barrier, Smem::kBytes);
    for (int row = lane * box_; row < C.tile().n; row += 32 * box_) {
      ptx::BoxPlace at = place_of(key + row);
#pragma unroll
      for (int g = 0; g < Smem::kGroups; ++g) {
        at.column = g * Smem::kGroupCols;
        ptx::tma_load(shared + row * Smem::kRowBytes + g * Smem::kGroupBytes, map_, at, barrier);
      }
    }
  }

 private:
  // A box outside the tensor is zeros: one of keys behind the last, or of a page that is not there.
  FLASH_DEVICE ptx::BoxPlace place_of(int key) const {
    if (key >= seqlen_k_) return {0, 0, head_k_, -1};
    if (pages_ == nullptr) return {0, row_ + key, head_k_, batch_};
    const int index = page_size_.quotient(key);
    return {0, key - index * page_size_.divisor, head_k_, pages_[index]};
  }

  const CUtensorMap& map_;
  FastDivide page_size_;
  const int32_t* pages_;
  int box_, seqlen_k_, head_k_, batch_, row_;
};

// Rows of keys, or of values, anywhere: a warp's share of a slot.
template <DecodeConfig C, class Smem>
class RowCopier {
 public:
  FLASH_DEVICE RowCopier(const FwdParams& p, const DecodeLaunch& launch, const DecodePlace<C>& here,
                         const Operand& x, int64_t head_dim, bool aligned)
      : rows_({here.first_key_row(x), x.row_stride * kElementBytes, x.batch_stride * kElementBytes,
               static_cast<int>(head_dim), aligned},
              ptx::read_tid_x() % 32),
        pages_{here.seq.pages, static_cast<int>(p.k_entries), here.seq.leftpad, launch.page_size},
        seqlen_k_(here.seq.seqlen_k) {}

  FLASH_DEVICE void copy(uint32_t shared, int key, uint32_t barrier) const {
    const int row = ptx::read_tid_x() / 32 % kCopyingWarps * kRows;
    rows_.copy(shared + row * Smem::kRowBytes, key + row, seqlen_k_ - (key + row), pages_);
    ptx::cp_async_mbarrier_arrive(barrier);
  }

 private:
  static constexpr int kRows = C.tile().n / kCopyingWarps;  // of a warp
  static_assert(kRows % 8 == 0);

  WarpLoader<Smem, kRows> rows_;
  PageTable pages_;
  int seqlen_k_;
};

// Fills the rings with this CTA's blocks of keys, first to last.
template <DecodeConfig C, class LoaderOfK, class LoaderOfV>
FLASH_DEVICE void fill_rings(DecodeSmem<C>& smem, const KeyUnits<C>& units, const LoaderOfK& k,
                             const LoaderOfV& v) {
  using Smem = DecodeSmem<C>;
  RingPosition<C.tile().stages> at;
  const int first = units.first_key + units.mine.begin * units.blocks_of_unit * C.block_keys();
  const int end = units.first_key + units.end_block(units.mine.end - 1) * C.block_keys();
  for (int key = first; key < end; key += C.tile().n) {
    wait_empty(smem.k_barriers, at);
    k.copy(ptx::shared_address(smem.k[at.slot()]), key, full(smem.k_barriers, at));
    if constexpr (!C.tile().v_within_k) {
      wait_empty(smem.v_barriers, at);
      v.copy(ptx::shared_address(smem.v) + at.slot() * Smem::V::kBytes, key,
             full(smem.v_barriers, at));
    }
    at.advance();
  }
}

// A producer warp.
template <DecodeConfig C>
FLASH_DEVICE void produce(const FwdParams& p, const DecodeLaunch& launch,
                          const DecodePlace<C>& here, const KeyUnits<C>& units,
                          DecodeSmem<C>& smem) {
  using K = typename DecodeSmem<C>::K;
  using V = typename DecodeSmem<C>::V;
  if (launch.box_keys > 0) {
    if (ptx::read_tid_x() / 32 % kCopyingWarps != 0) return;
    fill_rings<C>(smem, units, BoxLoader<C, K>(launch, here, launch.k),
                  BoxLoader<C, V>(launch, here, launch.v));
  } else {
    fill_rings<C>(smem, units, RowCopier<C, K>(p, launch, here, p.k, p.d, launch.k_aligned),
                  RowCopier<C, V>(p, launch, here, p.v, p.d_v, launch.v_aligned));
  }
}

}  // namespace flash::hopper
