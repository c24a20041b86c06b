// In which order CTAs of the backward, each of which owns a block of keys, visit blocks of queries,
// and in which order they add to a block's dQ: pure functions of the mask and the numbers of
// blocks.
//
// A key block visits the query blocks that see it in descending order. CTAs start in ascending
// order of their key blocks, and add to a query block's dQ in the same order: those before have
// passed the block already, or are a turn ahead, under any mask. Any wait is for a lower key block,
// so all of them end, however few run at the same time.
//
// Where all CTAs of a head run at the same time and see the same queries, they start at different
// blocks instead and go on around, so that nobody waits for the first turns: key blocks form groups
// of `group` neighbours. To a query block's dQ the groups add in ascending order, the members of a
// group in that of their steps, and of their numbers where these are equal. Then a wait may be for
// an earlier step of any member, and the members have to run at the same time.
#pragma once

#include "common/block_range.h"
#include "common/mask.h"

namespace flash {

// Query blocks [begin, end), from `start` down and around.
struct QueryBlocks {
  int begin, end, start;

  FLASH_INLINE int count() const { return end - begin; }
  // The block that is visited at a step 0..count() - 1, and the step at which a block is.
  FLASH_INLINE int at(int step) const {
    const int block = start - step;
    return block >= begin ? block : block + count();
  }
  FLASH_INLINE int step_of(int block) const {
    return block <= start ? start - block : start - block + count();
  }
  FLASH_INLINE bool contains(int block) const { return begin <= block && block < end; }
};

// When a key block adds to a query block's dQ: after `before` others of `visitors` in all.
struct Turn {
  int before, visitors;

  FLASH_INLINE bool is_last() const { return before + 1 == visitors; }
};

struct BwdSchedule {
  Mask mask;
  int m, n;   // queries and keys of a block
  int group;  // key blocks

  // Key blocks that query block `block` sees.
  FLASH_INLINE BlockRange key_blocks(int block) const {
    return block_range(mask, block * m, block * m + m - 1, n);
  }

  FLASH_INLINE int first_of_group(int key_block) const { return key_block / group * group; }

  FLASH_INLINE QueryBlocks visits(int key_block) const {
    const QueryRange queries = mask.queries(key_block * n, key_block * n + n - 1);
    if (queries.end <= queries.begin) return {0, 0, 0};
    QueryBlocks blocks{queries.begin / m, (queries.end + m - 1) / m, 0};
    blocks.start = blocks.end - 1 - (key_block - first_of_group(key_block)) % blocks.count();
    return blocks;
  }

  // Whether a member of key_block's group adds to `block` before it does.
  FLASH_INLINE bool precedes(int member, int key_block, int step, int block) const {
    const QueryBlocks theirs = visits(member);
    if (!theirs.contains(block)) return false;
    const int their_step = theirs.step_of(block);
    return their_step < step || (their_step == step && member < key_block);
  }

  // Of key_block at `block`, its step `step`. count(first, end, f): how many numbers first..end - 1
  // f holds for; a warp may share them out.
  template <class Count>
  FLASH_INLINE Turn turn(int key_block, int block, int step, const Count& count) const {
    const BlockRange blocks = key_blocks(block);
    const int first = first_of_group(key_block);
    Turn turn{first > blocks.begin ? first - blocks.begin : 0, blocks.end - blocks.begin};
    const int begin = first > blocks.begin ? first : blocks.begin;
    const int end = first + group < blocks.end ? first + group : blocks.end;
    turn.before +=
        count(begin, end, [&](int member) { return precedes(member, key_block, step, block); });
    return turn;
  }
};

// Key blocks of a group, for `heads` of `key_blocks` each on a GPU that runs `slots` CTAs at a
// time. What it costs is simulated in tests/cpp/test_bwd_schedule.cpp.
FLASH_INLINE int bwd_group(const Mask& mask, int64_t heads, int64_t key_blocks, int64_t slots) {
  const bool is_full = mask.left < 0 && mask.right < 0;
  return is_full && key_blocks > 0 && heads * key_blocks <= slots ? static_cast<int>(key_blocks)
                                                                  : 1;
}

}  // namespace flash
