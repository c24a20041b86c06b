// How many tiles a packed batch takes, known without its lengths.
#pragma once

#include <cstdint>

#include "common/flash.h"

namespace flash::sm80 {

// For all sequences, each of which has at least one, and at least one for rows of no sequence; `m`
// queries in each.
inline int64_t packed_tiles(const SequenceGeometry& p, int64_t b, int64_t m) {
  return p.total_q / m + b + 1;
}

}  // namespace flash::sm80
