// Which blocks of keys a group of neighbouring queries has to visit, and which of them need no
// mask.
#pragma once

#include "base/host_device.h"
#include "common/mask.h"

namespace flash {

// Blocks [begin, end) hold a key that one of the queries sees; every query sees every key of the
// blocks [full_begin, full_end), a part of them. Both may be empty.
struct BlockRange {
  int begin, end;
  int full_begin, full_end;

  FLASH_INLINE bool contains(int block) const { return begin <= block && block < end; }
  FLASH_INLINE bool is_full(int block) const { return full_begin <= block && block < full_end; }
};

// For queries first..last, cut to the sequence, and blocks of `block_size` keys.
FLASH_INLINE BlockRange block_range(const Mask& mask, int first, int last, int block_size) {
  if (last > mask.seqlen_q - 1) last = mask.seqlen_q - 1;
  // Queries above the first key's diagonal see nothing.
  const int64_t above = static_cast<int64_t>(mask.seqlen_q) - mask.seqlen_k - mask.right;
  const int64_t top = mask.right >= 0 && above > first ? above : first;
  if (last < top || mask.seqlen_k == 0) return {0, 0, 0, 0};
  const int begin = mask.keys(static_cast<int>(top)).begin, end = mask.keys(last).end;
  // Both ends of a query's range grow with the query, so the last query begins and the first query
  // ends the keys that all see.
  const int all_begin = mask.keys(last).begin, all_end = mask.keys(first).end;
  BlockRange range;
  range.begin = begin / block_size;
  range.end = (end + block_size - 1) / block_size;
  range.full_begin = (all_begin + block_size - 1) / block_size;
  range.full_end = all_end / block_size;
  return range;
}

}  // namespace flash
