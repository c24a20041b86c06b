// Rows on their way into a KV cache: knew, rotated, and vnew.
//
// A few neighbouring threads own one row of K or V, of one token and head: each copies 16 bytes
// where rows are aligned, so that a row is moved in whole sectors. Pairs that are rotated are read
// and written element by element. A row that is in place already is not copied, and rotated in
// place: a thread reads both elements of a pair before it writes them.
#pragma once

#include "sm80/append_params.h"
#include "sm80/cache_place.h"
#include "sm80/fwd_params.h"
#include "sm80/query.h"

namespace flash::sm80 {

// The threads of a row.
struct RowLanes {
  int lane, lanes;

  // f(i) for this thread's share of first..end - 1.
  template <class F>
  FLASH_DEVICE void for_each(int first, int end, const F& f) const {
    for (int i = first + lane; i < end; i += lanes) f(i);
  }
};

// Copies the elements first..end - 1 of a row.
FLASH_DEVICE void copy_row(const RowLanes& mine, char* to, const char* from, int first, int end,
                           bool aligned) {
  if (to == from) return;
  const int chunks = aligned && first % kChunkElements == 0 ? (end - first) / kChunkElements : 0;
  const auto copy = [&](auto* destination, const auto* source, int begin, int count) {
    mine.for_each(begin, count, [&](int i) { destination[i] = source[i]; });
  };
  copy(reinterpret_cast<uint4*>(to + first * kElementBytes),
       reinterpret_cast<const uint4*>(from + first * kElementBytes), 0, chunks);
  copy(reinterpret_cast<uint16_t*>(to), reinterpret_cast<const uint16_t*>(from),
       first + chunks * kChunkElements, end);
}

// Copies the first rotary_dim elements of a row, rotated.
template <Dtype kDtype>
FLASH_DEVICE void rotate_row(const RowLanes& mine, const AppendParams& p, char* to,
                             const char* from, int64_t position) {
  auto* destination = reinterpret_cast<uint16_t*>(to);
  const auto* source = reinterpret_cast<const uint16_t*>(from);
  mine.for_each(0, static_cast<int>(p.rotary_dim / 2), [&](int i) {
    const RotaryPair pair = rotary_pair(p, i);
    uint16_t x0 = source[pair.first], x1 = source[pair.second];
    rotate<kDtype>(p, position, i, x0, x1);
    destination[pair.first] = x0;
    destination[pair.second] = x1;
  });
}

// A row of knew or vnew.
struct NewRow {
  bool is_v;
  int batch;
  int64_t token;
  int head;
};

// Writes `row` to its place in the cache. Its angles are those of
// `position`.
template <Dtype kDtype>
FLASH_DEVICE void append_row(const RowLanes& mine, const FwdParams& p, const AppendPlan& plan,
                             const NewRow& row, const CachePlace& place, int position) {
  const bool is_v = row.is_v;
  char* to = operand_row(is_v ? p.v : p.k, kDtype, place.entry, place.row, row.head);
  const char* from = operand_row(is_v ? p.vnew : p.knew, kDtype, row.batch, row.token, row.head);
  const int rotary_dim = is_v ? 0 : static_cast<int>(p.rotary_dim);
  if (rotary_dim > 0) rotate_row<kDtype>(mine, p, to, from, position);
  copy_row(mine, to, from, rotary_dim, static_cast<int>(is_v ? p.d_v : p.d),
           is_v ? plan.v_aligned : plan.k_aligned);
}

}  // namespace flash::sm80
