// In which order CTAs of the backward, each of which owns a block of keys, visit blocks of queries,
// and in which order they add to a block's dQ: pure functions of the mask and the numbers of
// blocks.
//
// A key block visits the query blocks that see it in descending order. CTAs start in ascending
// order of their key blocks, and add to a query block's dQ in the same order: those before have
// passed the block already, or are a turn ahead, under any mask. Any wait is for a lower key block,
// so all of them end, however few run at the same time.
#pragma once

#include "common/block_range.h"
#include "common/mask.h"

namespace flash {

// Query blocks [begin, end), visited from the last down.
struct QueryBlocks {
  int begin, end;

  FLASH_INLINE int count() const { return end - begin; }
  FLASH_INLINE int at(int step) const { return end - 1 - step; }  // step: 0..count() - 1
  FLASH_INLINE bool contains(int block) const { return begin <= block && block < end; }
};

// When a key block adds to a query block's dQ: after `before` others of `visitors` in all.
struct Turn {
  int before, visitors;

  FLASH_INLINE bool is_last() const { return before + 1 == visitors; }
};

struct BwdSchedule {
  Mask mask;
  int m, n;  // queries and keys of a block

  // Key blocks that query block `block` sees.
  FLASH_INLINE BlockRange key_blocks(int block) const {
    return block_range(mask, block * m, block * m + m - 1, n);
  }

  FLASH_INLINE QueryBlocks visits(int key_block) const {
    const QueryRange queries = mask.queries(key_block * n, key_block * n + n - 1);
    if (queries.end <= queries.begin) return {0, 0};
    return {queries.begin / m, (queries.end + m - 1) / m};
  }

  // Of key_block at `block`, which it visits.
  FLASH_INLINE Turn turn(int key_block, int block) const {
    const BlockRange blocks = key_blocks(block);
    return {key_block - blocks.begin, blocks.end - blocks.begin};
  }
};

}  // namespace flash
