// Where one sequence of a batch lies, told by index tensors that nobody has checked.
#pragma once

#include "base/index_tensors.h"
#include "common/seqlen.h"

namespace flash {

// Rows in use that a call can take: the cache has room for the new ones, and the tables of a rotary
// embedding reach as far as the positions of the queries.
inline int max_cached(const SequenceGeometry& p, const ScoreParams& score,
                      const AppendParams& append) {
  int64_t rows = p.seqlen_k;
  if (p.block_table != nullptr && p.max_pages * p.page_size < rows)
    rows = p.max_pages * p.page_size;
  rows -= p.seqlen_knew;
  if (append.rotary_dim == 0) return static_cast<int>(rows);
  const bool positions_differ = score.window_left >= 0 || score.window_right >= 0;
  const int64_t positions = positions_differ || p.seqlen_q == 0 ? p.seqlen_q : 1;
  if (append.rotary_rows - positions < rows) rows = append.rotary_rows - positions;
  return static_cast<int>(rows);
}

// A set of IndexTensor: bit i is the tensor of value i.
using IndexFaults = uint32_t;
FLASH_INLINE constexpr IndexFaults fault_of(IndexTensor tensor, bool is_fault) {
  return is_fault ? 1u << static_cast<int>(tensor) : 0u;
}

// Of the queries.
FLASH_INLINE IndexFaults query_faults(const SequenceGeometry& p, int batch) {
  if (p.cu_seqlens_q == nullptr) return 0;
  const int begin = p.cu_seqlens_q[batch], end = p.cu_seqlens_q[batch + 1];
  return fault_of(IndexTensor::kCuSeqlensQ, begin < 0 || (batch == 0 && begin != 0) ||
                                                end < begin || end > p.total_q ||
                                                end - begin > p.seqlen_q);
}

// Of the keys. A tensor is looked at if those that it is held to are in order.
FLASH_INLINE IndexFaults key_faults(const SequenceGeometry& p, int batch, int max_cached) {
  const bool is_packed = p.cu_seqlens_k != nullptr;
  IndexFaults faults = 0;
  int rows = static_cast<int>(p.seqlen_k), limit = max_cached;
  if (is_packed) {
    const int begin = p.cu_seqlens_k[batch], end = p.cu_seqlens_k[batch + 1];
    rows = length_of(p.cu_seqlens_k, batch);
    const bool is_outside = p.block_table == nullptr && end > p.total_k;
    // Of more rows seqused_k tells how many are used.
    const bool is_long = p.seqused_k == nullptr && (rows > p.seqlen_k || rows > max_cached);
    faults |= fault_of(IndexTensor::kCuSeqlensK, begin < 0 || (batch == 0 && begin != 0) ||
                                                     end < begin || is_outside || is_long);
    if (rows < limit) limit = rows;
  }
  if (faults == 0 && p.seqused_k != nullptr) {
    rows = p.seqused_k[batch];
    faults |= fault_of(is_packed ? IndexTensor::kSequsedK : IndexTensor::kCacheSeqlens,
                       rows < 0 || rows > limit);
  }
  if (faults == 0 && p.leftpad_k != nullptr) {
    faults |= fault_of(is_packed ? IndexTensor::kLeftpadK : IndexTensor::kCacheLeftpad,
                       p.leftpad_k[batch] < 0 || p.leftpad_k[batch] > rows);
  }
  if (p.cache_batch_idx != nullptr) {
    const int entry = p.cache_batch_idx[batch];
    faults |= fault_of(IndexTensor::kCacheBatchIdx, entry < 0 || entry >= p.k_entries);
  }
  return faults;
}

// As sequence(). Out of what is out of range it makes a sequence without queries, or without keys.
FLASH_INLINE Sequence bounded_sequence(const SequenceGeometry& p, int batch, int max_cached,
                                       IndexFaults& faults) {
  Sequence s = sequence(p, batch);
  faults = query_faults(p, batch);
  if (faults != 0) s.q_row = s.lse_row = s.seqlen_q = 0;
  const IndexFaults of_keys = key_faults(p, batch, max_cached);
  if (of_keys != 0) s.k_row = s.k_batch = s.seqlen_k = s.leftpad = s.cached = 0;
  faults |= of_keys;
  return s;
}

}  // namespace flash
