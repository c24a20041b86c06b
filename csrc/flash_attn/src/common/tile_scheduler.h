// In which order the tiles of a launch run: a pure function of the tile's number.
//
// Tiles start in the order of their numbers. Heads form sections whose keys and values fit into the
// L2 cache together; within a section the tiles of the last queries come first, for all heads in
// turn: under a causal mask those are the longest, and the short ones fill the gaps at the end.
// Heads of a GQA group are neighbours and find their keys in the cache.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace flash {

struct Tile_coordinates {
  int m_block;     // which block of queries
  int batch_head;  // batch * heads + head
};

struct Tile_scheduler {
  int m_blocks;  // of one head
  int heads;     // batch * query heads
  int section;   // heads in a section, 1..heads; the last section may be smaller

  FLASH_INLINE int64_t tiles() const { return static_cast<int64_t>(m_blocks) * heads; }

  FLASH_INLINE Tile_coordinates tile(int number) const {
    const int first_head = number / (section * m_blocks) * section;
    const int rest = number - first_head * m_blocks;
    const int here = heads - first_head < section ? heads - first_head : section;
    return {m_blocks - 1 - rest / here, first_head + rest % here};
  }
};

// Heads in a section: as many GQA groups of `group` heads as have their keys and values, `kv_bytes`
// for a group, in `cache_bytes`; at least one.
FLASH_INLINE int section_of(int64_t heads, int64_t group, int64_t kv_bytes, int64_t cache_bytes) {
  int64_t groups = kv_bytes > 0 ? cache_bytes / kv_bytes : heads;
  if (groups < 1) groups = 1;
  const int64_t section = groups >= heads / group ? heads : groups * group;
  return static_cast<int>(section);
}

}  // namespace flash
