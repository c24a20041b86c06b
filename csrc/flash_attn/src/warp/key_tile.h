// Where a CTA of the backward is: its keys, the queries that it visits.
#pragma once

#include "common/bwd_schedule.h"
#include "common/mask.h"
#include "common/seqlen.h"
#include "warp/bwd_params.h"
#include "warp/packed_tiles.h"

namespace flash {

// A block of queries of one head.
struct QueryBlock {
  int head, block;
};

// A CTA's block of keys of one key-value head. In shared memory, not in registers: one thread finds
// it for all, and the products need every register.
struct KeyTile {
  PackedTile place;  // m_block: key block
  Sequence seq;
  Mask mask;
  int head_k;
  int key_block, first_key, keys;  // keys: that there are
  QueryBlocks visits;
  int first_q_block;  // in BwdLaunch's dq_sums and turns, of the sequence's head 0
};

// A visit: to a block of queries of one head. The heads of a group take turns at a block, so that
// the CTAs of their keys stay in step (common/bwd_schedule.h).
struct Visit {
  int step, head;  // head: of the group

  FLASH_INLINE Visit next(int heads) const {
    return head + 1 < heads ? Visit{step, head + 1} : Visit{step + 1, 0};
  }
};

FLASH_INLINE QueryBlock query_block(const BwdTiles& launch, const KeyTile& here,
                                    const Visit& visit) {
  return {here.head_k * launch.group + visit.head, here.visits.at(visit.step)};
}

}  // namespace flash
