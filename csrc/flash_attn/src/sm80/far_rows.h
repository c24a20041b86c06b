// The scores of rows of the backward that are far from 0 (warp/far_rows.h), by the instructions of
// the main kernel and of the forward.
#pragma once

#include "base/ptx/mma.h"
#include "warp/far_rows.h"

namespace flash::sm80 {

// Of a block of queries; each warp multiplies for itself.
template <Dtype kDtype>
class FarScores {
 public:
  static constexpr int kKeys = 32;

  FLASH_DEVICE FarScores(const BwdParams& p, const BwdPrepareLaunch& launch, const FarBlock& rows)
      : p_(p), launch_(launch), rows_(rows) {}

  FLASH_DEVICE void multiply(int) const {}

  // S = Q K^T of 8 keys from first + within on.
  FLASH_DEVICE void load(float (&rS)[4], int first, int within) const {
    const int first_key = first + within;
    const int lane = ptx::read_tid_x() % 32, d = static_cast<int>(p_.d);
    const char* q[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = rows_.first_query + ptx::a_element(lane, i, 0).row;
      q[i] = query < rows_.seq.seqlen_q
                 ? operand_row(p_.q, kDtype, rows_.seq.batch, rows_.seq.q_row + query, rows_.head)
                 : nullptr;
    }
    const int key = first_key + ptx::b_element(lane, 0, 0).col;
    const char* k = key < rows_.seq.seqlen_k
                        ? operand_row(p_.k, kDtype, rows_.seq.k_batch, rows_.seq.k_row + key,
                                      rows_.head / launch_.group)
                        : nullptr;
#pragma unroll
    for (int i = 0; i < 4; ++i) rS[i] = 0.f;
#pragma unroll 1
    for (int column = 0; column < d; column += 16) {
      uint32_t a[4], b[2];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = load_pair(q[i % 2], column + ptx::a_element(lane, i, 0).col, d, launch_.q_aligned);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        b[i] = load_pair(k, column + ptx::b_element(lane, i, 0).row, d, launch_.k_aligned);
      ptx::mma_m16n8k16<kDtype>(rS, a, b[0], b[1]);
    }
  }

 private:
  const BwdParams& p_;
  const BwdPrepareLaunch& launch_;
  const FarBlock& rows_;
};

}  // namespace flash::sm80
