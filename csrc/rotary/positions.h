// Which row of the tables a token is turned by, told by index tensors that nobody has checked.
#pragma once

#include "rotary/params.h"

namespace flash::rotary {

struct Sequence {
  int64_t begin, length;  // tokens
  int64_t offset;         // position of the first
  bool fits = true;       // what cu_seqlens tells of it is in order
  bool has_rows = true;   // and the tables reach as far as its positions
};

FLASH_INLINE Sequence sequence(const Params& p, int64_t i) {
  Sequence s{0, p.seqlen, p.seqlen_offset};
  if (p.cu_seqlens.ptr != nullptr) {
    const int64_t begin = p.cu_seqlens[i], end = p.cu_seqlens[i + 1];
    s.fits = begin >= 0 && (i > 0 || begin == 0) && begin <= end && end <= p.seqlen &&
             end - begin <= p.max_seqlen;
    s.begin = begin;
    s.length = s.fits ? end - begin : 0;
  }
  if (p.seqlen_offsets.ptr != nullptr) s.offset = p.seqlen_offsets[i];
  s.has_rows = s.length == 0 || (s.offset >= 0 && s.offset <= p.table_rows - s.length);
  return s;
}

// The sequence of a packed token, by bisection: if `cu_seqlens` does not ascend, any that has it;
// -1: none.
FLASH_INLINE int64_t sequence_of(const Params& p, int64_t token) {
  int64_t low = 0, high = p.sequences;
  if (p.cu_seqlens[0] > token || p.cu_seqlens[high] <= token) return -1;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (p.cu_seqlens[middle] <= token ? low : high) = middle;
  }
  return low;
}

// The row of the tables for token t of a batch entry; -1: it is not turned.
FLASH_INLINE int64_t table_row(const Params& p, int64_t batch, int64_t t) {
  const int64_t i = p.cu_seqlens.ptr != nullptr ? sequence_of(p, t) : batch;
  if (i < 0) return -1;
  const Sequence s = sequence(p, i);
  return s.fits && s.has_rows ? s.offset + (t - s.begin) : -1;
}

}  // namespace flash::rotary
