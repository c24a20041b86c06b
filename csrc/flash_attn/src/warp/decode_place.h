// Where a CTA of the decode kernels is: its rows, its sequence and its share of the keys.
#pragma once

#include "common/block_range.h"
#include "common/seqlen.h"
#include "common/split_heuristic.h"
#include "warp/decode_plan.h"

namespace flash {

// The keys that rows see.
struct FoldedMask {
  Mask mask;
  FastDivide group;
  int seqlen_k;

  FLASH_INLINE int query(int row) const { return group.quotient(row); }
  FLASH_INLINE KeyRange keys(int row) const { return mask.keys(query(row)); }
};

// Where this CTA is.
template <auto C>
struct DecodePlace {
  int batch, head_k;
  int tile;       // of the launch
  int first_row;  // of the tile
  int rows;       // of the tile; none are left if it is not positive
  int sharer;     // which of the CTAs that share the tile
  Sequence seq;
  FoldedMask mask;

  // Has its sequence yet to be found.
  FLASH_INLINE DecodePlace(const Operands& p, const DecodePlan& launch, int cta) {
    const int group_of_tiles = cta / launch.tiles;
    const int group_of_ctas = group_of_tiles / launch.ctas_per_tile;
    sharer = group_of_tiles - group_of_ctas * launch.ctas_per_tile;
    batch = group_of_ctas / static_cast<int>(p.h_k);
    head_k = group_of_ctas - batch * static_cast<int>(p.h_k);
    const int tile_of_head = cta - group_of_tiles * launch.tiles;
    tile = group_of_ctas * launch.tiles + tile_of_head;
    first_row = tile_of_head * C.rows();
  }

  FLASH_INLINE void take(const ScoreParams& p, const DecodePlan& launch, const Sequence& found) {
    seq = found;
    mask = {mask_of(p, seq), launch.group, seq.seqlen_k};
    rows = seq.seqlen_q * launch.group.divisor - first_row;
    if (rows > C.rows()) rows = C.rows();
  }

  // Row `row` of the tile.
  FLASH_INLINE int query(int row) const { return mask.query(first_row + row); }
  FLASH_INLINE int head(int row) const {
    return head_k * mask.group.divisor + first_row + row - query(row) * mask.group.divisor;
  }
  FLASH_INLINE char* row_of(const Operand& x, int row) const {
    return operand_row(x, C.dtype, batch, seq.q_row + query(row), head(row));
  }
  // Of key 0; with pages the first row of page 0.
  FLASH_INLINE const char* first_key_row(const Operand& x) const {
    if (seq.pages) return operand_row(x, C.dtype, 0, 0, head_k);
    return operand_row(x, C.dtype, seq.k_batch, seq.k_row + seq.leftpad, head_k);
  }
};

// The blocks of keys that a tile's rows see, and this CTA's units of them.
template <auto C>
struct KeyUnits {
  BlockRange seen;  // of single keys
  int first_key;    // of block 0
  int blocks, blocks_of_unit;
  int count;  // of units
  UnitShare mine;

  FLASH_INLINE KeyUnits(const DecodePlan& launch, const DecodePlace<C>& here) {
    seen = block_range(here.mask.mask, here.query(0), here.query(here.rows - 1), 1);
    first_key = seen.begin / C.block_keys() * C.block_keys();
    const int keys = seen.end - first_key;
    blocks = (keys + C.block_keys() - 1) / C.block_keys();
    blocks_of_unit = unit_keys(keys, launch.num_splits, C.block_keys(), C.units()) / C.block_keys();
    count = (blocks + blocks_of_unit - 1) / blocks_of_unit;
    mine = share_of(here.sharer, launch.ctas_per_tile, count);
  }

  FLASH_INLINE int end_block(int unit) const {
    return (unit + 1) * blocks_of_unit < blocks ? (unit + 1) * blocks_of_unit : blocks;
  }
};

}  // namespace flash
