// New rows of a KV cache, appended by the decode kernels: attention in the same launch reads them.
//
// Where a head's rows of queries are one tile, each of its keys is read by one CTA alone, the one
// that has the key's unit. It writes the new rows among its keys before it reads any, and a barrier
// of the CTA puts the one before the other; cp.async is of the generic proxy (PTX ISA, "Proxies"),
// so that no fence is needed. Units cover the keys that are seen: the first CTA of a tile also has
// the keys before the first unit, the last one those behind the last unit.
#pragma once

#include "sm80/append_rows.h"
#include "sm80/decode_params.h"
#include "sm80/decode_table.h"
#include "warp/decode_place.h"

namespace flash::sm80 {

// The new rows that this CTA appends, by their keys.
template <DecodeConfig C>
FLASH_DEVICE KeyRange keys_to_append(const DecodeLaunch& launch, const DecodePlace<C>& here,
                                     const KeyUnits<C>& units) {
  const auto first_key = [&](int unit) {
    return units.first_key + unit * units.blocks_of_unit * C.block_keys();
  };
  const int seqlen_k = here.seq.seqlen_k;  // 0: what is told of the sequence is out of range
  KeyRange keys{max(seqlen_k - launch.new_rows, 0), seqlen_k};
  if (here.sharer > 0) keys.begin = max(keys.begin, first_key(units.mine.begin));
  if (here.sharer < units.mine.sharers - 1) keys.end = min(keys.end, first_key(units.mine.end));
  return keys;
}

// Appends them. Pages that do not exist are told by check_pages.
template <DecodeConfig C>
FLASH_DEVICE void append_keys(const FwdParams& p, const DecodeLaunch& launch,
                              const DecodePlace<C>& here, const KeyUnits<C>& units) {
  const KeyRange keys = keys_to_append(launch, here, units);
  if (keys.begin >= keys.end) return;
  const AppendPlan& plan = launch.append;
  const int thread = ptx::read_tid_x(), first_new = here.seq.seqlen_k - launch.new_rows;
  const RowLanes mine{thread & (plan.lanes - 1), plan.lanes};
#pragma unroll 1
  for (int i = thread / plan.lanes; i < 2 * (keys.end - keys.begin);
       i += C.threads() / plan.lanes) {
    const bool is_v = i % 2 != 0;
    if (!(is_v ? plan.writes_v : plan.writes_k)) continue;
    const int key = keys.begin + i / 2, position = here.seq.leftpad + key;
    IndexFaults faults = 0;
    const CachePlace place = place_of(here.seq, launch.page_size, p.k_entries, position, faults);
    if (faults != 0) continue;
    append_row<C.dtype>(mine, p, plan, {is_v, here.batch, key - first_new, here.head_k}, place,
                        position);
  }
  __syncthreads();
}

}  // namespace flash::sm80
