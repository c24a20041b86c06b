// Where one sequence of a batch lies: dense, packed ("varlen") or in a (paged) cache.
#pragma once

#include "base/host_device.h"
#include "common/flash.h"
#include "common/mask.h"

namespace flash {

struct Sequence {
  int batch;      // its index
  int64_t q_row;  // first row of q, out, dq, ... within the batch entry (varlen: within the packed
                  // tensor)
  int64_t lse_row;  // first column of softmax_lse
  int64_t k_row;    // first row of k, v (not paged)
  int64_t k_batch;  // batch entry of k, v (not paged)
  int seqlen_q,
      seqlen_k;          // seqlen_k: visible to attention, without left padding, with appended keys
  int leftpad;           // rows of k, v skipped before key 0
  int cached;            // rows of the cache in use before appending, left padding included
  const int32_t* pages;  // its row of block_table, or nullptr
};

// Entry i + 1 less entry i. Of entries that nobody has checked, too: it wraps around.
FLASH_INLINE int length_of(const int32_t* cu_seqlens, int i) {
  return static_cast<int>(static_cast<uint32_t>(cu_seqlens[i + 1]) -
                          static_cast<uint32_t>(cu_seqlens[i]));
}

FLASH_INLINE Sequence sequence(const SequenceGeometry& p, int batch) {
  Sequence s{};
  s.batch = batch;
  s.seqlen_q = static_cast<int>(p.cu_seqlens_q ? length_of(p.cu_seqlens_q, batch) : p.seqlen_q);
  s.q_row = s.lse_row = p.cu_seqlens_q ? p.cu_seqlens_q[batch] : 0;
  const bool packed_k = p.cu_seqlens_k && !p.block_table;
  s.k_row = packed_k ? p.cu_seqlens_k[batch] : 0;
  s.k_batch = packed_k ? 0 : p.cache_batch_idx ? p.cache_batch_idx[batch] : batch;
  s.cached = static_cast<int>(p.cu_seqlens_k ? length_of(p.cu_seqlens_k, batch) : p.seqlen_k);
  if (p.seqused_k) s.cached = p.seqused_k[batch];
  s.leftpad = p.leftpad_k ? p.leftpad_k[batch] : 0;
  s.seqlen_k = static_cast<int>(s.cached + p.seqlen_knew - s.leftpad);
  if (s.seqlen_k < 0) s.seqlen_k = 0;
  s.pages = p.block_table ? p.block_table + batch * p.block_table_batch_stride : nullptr;
  return s;
}

FLASH_INLINE Mask mask_of(const ScoreParams& p, const Sequence& s) {
  return {s.seqlen_q, s.seqlen_k, p.window_left, p.window_right};
}

FLASH_INLINE char* operand_row(const Operand& x, Dtype t, int64_t batch, int64_t row,
                               int64_t head) {
  return static_cast<char*>(x.ptr) +
         (batch * x.batch_stride + row * x.row_stride + head * x.head_stride) * dtype_bytes(t);
}

// Row `index` of the cache (0 = the first row before left padding) of a sequence, for key-value
// head `head`.
FLASH_INLINE char* cache_row(const Attention_params& p, const Operand& x, const Sequence& s,
                             int64_t index, int64_t head) {
  if (s.pages)
    return operand_row(x, p.kv_dtype, s.pages[index / p.page_size], index % p.page_size, head);
  return operand_row(x, p.kv_dtype, s.k_batch, s.k_row + index, head);
}

}  // namespace flash
