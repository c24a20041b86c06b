// Appending to a KV cache, in a launch before attention: knew, rotated, and vnew go behind the rows
// in use.
//
// The rows are read once and written once (append_rows.h); attention reads them afterwards, from
// L2. Where decoding's CTAs append what they read, there is no such launch (decode_append.h).
#pragma once

#include "base/ptx/special_registers.h"
#include "base/row_config.h"
#include "common/bounded_sequence.h"
#include "sm80/append_rows.h"
#include "warp/report.h"

namespace flash::sm80 {

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

  append_row<C.dtype>(mine, p, launch, {is_v, batch, token, head}, place, position);
}

}  // namespace flash::sm80
