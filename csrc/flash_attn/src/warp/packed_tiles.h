// A CTA's tile of a batch, and the number of tiles of a packed one, as far as it is known without
// the lengths.
#pragma once

#include <cstdint>

#include "common/seqlen.h"

namespace flash {

struct PackedTile {
  int batch;    // p.b: rows of no sequence
  int m_block;  // of the sequence; of the tiles for rows of no sequence, which one
  int others;   // how many tiles there are for those, if it is one of them
};

// A CTA's tile of queries: one thread finds it for all.
struct CtaTile {
  PackedTile place;
  Sequence sequence;
};

// For all of `b` sequences, each of which has at least one, and at least one for rows of no
// sequence; of `total` rows `m` in each.
constexpr int64_t packed_tiles(int64_t total, int64_t b, int64_t m) { return total / m + b + 1; }

}  // namespace flash
