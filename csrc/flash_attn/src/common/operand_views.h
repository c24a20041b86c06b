// q, k, v and out of a forward call as tensor maps describe them: [d, heads, rows, batch] from the
// innermost dimension out. A packed batch has rows of all sequences and a batch of 1, so that a
// kernel's instructions are of one rank; of a cache, the batch is its entries or pages.
#pragma once

#include <algorithm>

#include "base/strided_view.h"
#include "common/flash.h"

namespace flash {

struct OperandExtents {
  int64_t d, heads, rows, batch;
};

inline StridedView view_of(const Operand& x, Dtype dtype, const OperandExtents& e) {
  return {x.ptr,
          dtype,
          4,
          {e.d, e.heads, e.rows, e.batch},
          {1, x.head_stride, x.row_stride, x.batch_stride}};
}

struct OperandViews {
  StridedView q, k, v, o;
};

inline OperandViews operand_views(const Attention_params& p) {
  const bool packs_q = p.cu_seqlens_q != nullptr, is_paged = p.block_table != nullptr;
  const bool packs_k = p.cu_seqlens_k != nullptr && !is_paged;
  const int64_t q_rows = packs_q ? p.total_q : p.seqlen_q, q_batch = packs_q ? 1 : p.b;
  const int64_t k_rows = packs_k ? p.total_k : is_paged ? p.page_size : p.seqlen_k;
  const int64_t k_batch = packs_k ? 1 : p.k_entries;
  return {view_of(p.q, p.dtype, {p.d, p.h, q_rows, q_batch}),
          view_of(p.k, p.kv_dtype, {p.d, p.h_k, k_rows, k_batch}),
          view_of(p.v, p.kv_dtype, {p.d_v, p.h_k, k_rows, k_batch}),
          view_of(p.o, p.o_dtype, {p.d_v, p.h, q_rows, q_batch})};
}

// Of the gradient of out.
inline StridedView dout_view(const Attention_params& p, const Operand& dout) {
  const bool is_packed = p.cu_seqlens_q != nullptr;
  return view_of(dout, p.dtype,
                 {p.d_v, p.h, is_packed ? p.total_q : p.seqlen_q, is_packed ? 1 : p.b});
}

inline bool can_map(const OperandViews& x) {
  return can_map(x.q) && can_map(x.k) && can_map(x.v) && can_map(x.o);
}

// Whether there is nothing in it, so that no map of it is needed.
inline bool is_empty(const StridedView& x) {
  return std::any_of(x.extents.begin(), x.extents.begin() + x.rank,
                     [](int64_t extent) { return extent == 0; });
}

inline bool can_map_if_any(const OperandViews& x) {
  const auto can = [](const StridedView& view) { return is_empty(view) || can_map(view); };
  return can(x.q) && can(x.k) && can(x.v) && can(x.o);
}

}  // namespace flash
