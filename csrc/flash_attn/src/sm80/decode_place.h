// Where a CTA of the decode kernels is: its rows, its sequence and its share of the keys.
#pragma once

#include "base/ptx/special_registers.h"
#include "common/block_range.h"
#include "common/bounded_sequence.h"
#include "common/split_heuristic.h"
#include "sm80/decode_params.h"
#include "sm80/decode_smem.h"
#include "warp/report.h"

namespace flash::sm80 {

// The keys that rows see.
struct FoldedMask {
  Mask mask;
  FastDivide group;
  int seqlen_k;

  FLASH_DEVICE int query(int row) const { return group.quotient(row); }
  FLASH_DEVICE KeyRange keys(int row) const { return mask.keys(query(row)); }
};

// Where this CTA is.
template <DecodeConfig C>
struct DecodePlace {
  int batch, head_k;
  int tile;       // of the launch
  int first_row;  // of the tile
  int rows;       // of the tile; none are left if it is not positive
  int sharer;     // which of the CTAs that share the tile
  Sequence seq;
  FoldedMask mask;

  // Has its sequence yet to be found.
  FLASH_DEVICE DecodePlace(const FwdParams& p, const DecodeLaunch& launch) {
    const int cta = ptx::read_ctaid_x();
    const int group_of_tiles = cta / launch.tiles;
    const int group_of_ctas = group_of_tiles / launch.ctas_per_tile;
    sharer = group_of_tiles - group_of_ctas * launch.ctas_per_tile;
    batch = group_of_ctas / static_cast<int>(p.h_k);
    head_k = group_of_ctas - batch * static_cast<int>(p.h_k);
    const int tile_of_head = cta - group_of_tiles * launch.tiles;
    tile = group_of_ctas * launch.tiles + tile_of_head;
    first_row = tile_of_head * kDecodeRows;
  }

  FLASH_DEVICE void take(const FwdParams& p, const DecodeLaunch& launch, const Sequence& found) {
    seq = found;
    mask = {mask_of(p, seq), launch.group, seq.seqlen_k};
    rows = min(seq.seqlen_q * launch.group.divisor - first_row, kDecodeRows);
  }

  // Row `row` of the tile.
  FLASH_DEVICE int query(int row) const { return mask.query(first_row + row); }
  FLASH_DEVICE int head(int row) const {
    return head_k * mask.group.divisor + first_row + row - query(row) * mask.group.divisor;
  }
  FLASH_DEVICE char* row_of(const Operand& x, int row) const {
    return operand_row(x, C.dtype, batch, seq.q_row + query(row), head(row));
  }
  // Of key 0; with pages the first row of page 0.
  FLASH_DEVICE const char* first_key_row(const Operand& x) const {
    if (seq.pages) return operand_row(x, C.dtype, 0, 0, head_k);
    return operand_row(x, C.dtype, seq.k_batch, seq.k_row + seq.leftpad, head_k);
  }
};

// One thread reads index tensors and checks them: the others need no registers for it.
template <DecodeConfig C>
FLASH_DEVICE void find_sequence(DecodePlace<C>& here, const FwdParams& p,
                                const DecodeLaunch& launch, Sequence& found) {
  if (ptx::read_tid_x() == 0) {
    IndexFaults faults;
    found = bounded_sequence(p, here.batch, launch.bounds.max_cached, faults);
    if (faults != 0) report(launch.bounds, faults);
  }
  __syncthreads();
  here.take(p, launch, found);
}

// One CTA of each sequence looks for pages that do not exist.
template <DecodeConfig C>
FLASH_DEVICE void check_pages(const FwdParams& p, const DecodeLaunch& launch,
                              const DecodePlace<C>& here) {
  if (here.seq.pages == nullptr || here.sharer != 0 || here.first_row != 0 || here.head_k != 0)
    return;
  const IndexFaults faults = page_faults(here.seq, launch.page_size, p.k_entries, C.threads());
  if (faults != 0) report(launch.bounds, faults);
}

// The blocks of keys that a tile's rows see, and this CTA's units of them.
template <DecodeConfig C>
struct KeyUnits {
  BlockRange seen;  // of single keys
  int first_key;    // of block 0
  int blocks, blocks_of_unit;
  int count;  // of units
  UnitShare mine;

  FLASH_DEVICE KeyUnits(const DecodeLaunch& launch, const DecodePlace<C>& here) {
    seen = block_range(here.mask.mask, here.query(0), here.query(here.rows - 1), 1);
    first_key = seen.begin / C.block_keys() * C.block_keys();
    const int keys = seen.end - first_key;
    blocks = (keys + C.block_keys() - 1) / C.block_keys();
    blocks_of_unit = unit_keys(keys, launch.num_splits, C.block_keys()) / C.block_keys();
    count = (blocks + blocks_of_unit - 1) / blocks_of_unit;
    mine = share_of(here.sharer, launch.ctas_per_tile, count);
  }

  FLASH_DEVICE int end_block(int unit) const { return min((unit + 1) * blocks_of_unit, blocks); }
};

}  // namespace flash::sm80
