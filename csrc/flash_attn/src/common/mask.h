// Which keys a query sees, on every backend.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace flash {

struct KeyRange {
  int begin, end;  // [begin, end), empty if end <= begin
};

struct QueryRange {
  int begin, end;  // [begin, end), empty if end <= begin
};

// Causal and windowed masks of one sequence, aligned to the bottom right corner; a window of -1 has
// no limit.
struct Mask {
  int seqlen_q, seqlen_k;
  int64_t left, right;

  FLASH_INLINE KeyRange keys(int query) const {
    const int64_t diagonal = static_cast<int64_t>(query) + seqlen_k - seqlen_q;
    int64_t begin = left < 0 ? 0 : diagonal - left;
    int64_t end = right < 0 ? seqlen_k : diagonal + right + 1;
    if (begin < 0) begin = 0;
    if (end > seqlen_k) end = seqlen_k;
    if (end < begin) end = begin;
    return {static_cast<int>(begin), static_cast<int>(end)};
  }

  // Keys that any of the queries [first, last] sees; the union of neighbouring ranges has no gap.
  FLASH_INLINE KeyRange keys(int first, int last) const {
    // Queries above the first key's diagonal see nothing and would pull the range to 0.
    KeyRange range = keys(last);
    const KeyRange top = keys(first);
    if (top.end > top.begin && top.begin < range.begin) range.begin = top.begin;
    if (top.end > range.end) range.end = top.end;
    if (top.end <= top.begin) range.begin = 0;
    return range;
  }

  // Queries that see any of the keys [first, last]; each of their neighbours' ranges has no gap.
  FLASH_INLINE QueryRange queries(int first, int last) const {
    if (last > seqlen_k - 1) last = seqlen_k - 1;
    if (last < first) return {0, 0};
    const int64_t shift = static_cast<int64_t>(seqlen_q) - seqlen_k;  // of the diagonal's query
    int64_t begin = right < 0 ? 0 : first + shift - right;
    int64_t end = left < 0 ? seqlen_q : last + shift + left + 1;
    if (begin < 0) begin = 0;
    if (end > seqlen_q) end = seqlen_q;
    if (end < begin) end = begin;
    return {static_cast<int>(begin), static_cast<int>(end)};
  }
};

}  // namespace flash
