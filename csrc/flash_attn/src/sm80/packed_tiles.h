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

// For all of `b` sequences, each of which has at least one, and at least one for rows of no
// sequence; of `total` rows `m` in each.
constexpr int64_t packed_tiles(int64_t total, int64_t b, int64_t m) { return total / m + b + 1; }

}  // namespace flash::sm80
