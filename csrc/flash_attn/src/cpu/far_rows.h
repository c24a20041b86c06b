// Where the CPU backend keeps the references of rows that are far from 0, and how it finds them.
#pragma once

#include "common/far_rows.h"
#include "cpu/row_state.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// [b, h, seqlen_q], written where rows are far; null if none is.
struct FarRows {
  RowReference* references = nullptr;
  int64_t h = 0, seqlen_q = 0;

  FLASH_INLINE RowReference& at(int batch, int head, int query) const {
    return references[(batch * h + head) * seqlen_q + query];
  }
};

// Of a row with these scores: it is normalised by its own sum only if that is what softmax_lse is.
inline RowReference far_reference(RowState state, float lse) {
  return is_own_lse(lse, state.lse(1.f)) ? RowReference{state.max, __builtin_logf(state.sum)}
                                         : RowReference{lse, 0.f};
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
