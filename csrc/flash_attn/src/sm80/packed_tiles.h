// The tiles of a packed batch, as far as they are known without its lengths.
#pragma once

#include <cstdint>

#include "common/flash.h"

namespace flash::sm80 {

struct PackedTile {
  int batch;    // p.b: rows of no sequence
  int m_block;  // of the sequence; of the tiles for rows of no sequence, which one
  int others;   // how many tiles there are for those, if it is one of them
};

// For all sequences, each of which has at least one, and at least one for rows of no sequence; `m`
// queries in each.
inline int64_t packed_tiles(const SequenceGeometry& p, int64_t b, int64_t m) {
  return p.total_q / m + b + 1;
}

}  // namespace flash::sm80
