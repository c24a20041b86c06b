// Appending to a KV cache: knew, rotated, and vnew go behind the rows in use.
//
// A few neighbouring threads own one row of K or V, of one token and head: each copies 16 bytes
// where rows are aligned, so that a row is moved in whole sectors. Pairs that are rotated are read
// and written element by element. A row that is in place already is not copied, and rotated in
// place: a thread reads both elements of a pair before it writes them.
//
// The rows are read once and written once; attention reads them afterwards, from L2.
#pragma once

#include "base/ptx/special_registers.h"
#include "base/row_config.h"
#include "common/bounded_sequence.h"
#include "sm80/append_params.h"
#include "sm80/cache_place.h"
#include "sm80/fwd_params.h"
#include "sm80/query.h"
#include "sm80/report.h"

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

template <RowConfig C>
FLASH_DEVICE void append(const FwdParams& p, const AppendLaunch& launch) {
  const int64_t thread = static_cast<int64_t>(ptx::read_ctaid_x()) * C.threads() + threadIdx.x;
  const RowLanes mine{static_cast<int>(thread) & (launch.lanes - 1), launch.lanes};
  const int64_t number = thread / launch.lanes;  // rows of K, then those of V
  if (number >= 2 * launch.rows) return;
  const bool is_v = number >= launch.rows;
  if (!(is_v ? launch.writes_v : launch.writes_k)) return;

  const int64_t row = is_v ? number - launch.rows : number;
  const int head = static_cast<int>(row % p.h_k);
  const int64_t token = row / p.h_k % p.seqlen_knew;
  const int batch = static_cast<int>(row / p.h_k / p.seqlen_knew);
  IndexFaults faults;
  const Sequence seq = bounded_sequence(p, batch, launch.bounds.max_cached, faults);
  const int position = seq.cached + static_cast<int>(token);
  CachePlace place{};
  if (faults == 0) place = place_of(seq, launch.page_size, p.k_entries, position, faults);
  if (faults != 0) {
    if (mine.lane == 0) report(launch.bounds, faults);
    return;
  }

  char* to = operand_row(is_v ? p.v : p.k, C.dtype, place.entry, place.row, head);
  const char* from = operand_row(is_v ? p.vnew : p.knew, C.dtype, batch, token, head);
  const int rotary_dim = is_v ? 0 : static_cast<int>(p.rotary_dim);
  if (rotary_dim > 0) rotate_row<C.dtype>(mine, p, to, from, position);
  copy_row(mine, to, from, rotary_dim, static_cast<int>(is_v ? p.d_v : p.d),
           is_v ? launch.v_aligned : launch.k_aligned);
}

}  // namespace flash::sm80
