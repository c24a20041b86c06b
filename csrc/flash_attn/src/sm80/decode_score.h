// What the decode kernels' scores go through, whose rows are of several heads.
#pragma once

#include "sm80/decode_smem.h"
#include "sm80/query.h"
#include "warp/decode_score.h"

namespace flash::sm80 {

// Hides the scores of keys that their row does not see.
template <DecodeConfig C>
FLASH_DEVICE void apply_mask(typename WarpTile<C>::Scores& rS, const FoldedMask& mask,
                             int first_row, int first_key) {
  const int lane = ptx::read_tid_x() % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const ptx::Element first = ptx::accumulator_element(lane, 2 * half);
    const KeyRange keys = mask.keys(first_row + first.row);
    const int begin = keys.begin - (first_key + first.col);
    const int end = keys.end - (first_key + first.col);
#pragma unroll
    for (int n = 0; n < WarpTile<C>::kS; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = n * 8 + i;
        if (key < begin || key >= end) rS[0][n][2 * half + i] = -INFINITY;
      }
    }
  }
}

// rS += bias, whose elements to_float(element) makes floats.
template <DecodeConfig C, class Element, class ToFloat>
FLASH_DEVICE void add_bias(typename WarpTile<C>::Scores& rS, const Bias& bias,
                           const DecodePlace<C>& here, int first_key, const ToFloat& to_float) {
  const ptx::Element first = ptx::accumulator_element(ptx::read_tid_x() % 32, 0);
  const int key = first_key + first.col, columns = here.seq.seqlen_k - key;
  const Element* row_of_bias[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = min(first.row + 8 * half, here.rows - 1);
    row_of_bias[half] = static_cast<const Element*>(bias.ptr) + here.batch * bias.batch_stride +
                        here.head(row) * bias.head_stride + here.query(row) * bias.row_stride +
                        key * bias.col_stride;
  }
  for_each_score<C>(rS, [&](float& s, int row, int column) {
    if (column < columns) s += to_float(row_of_bias[row / 8][column * bias.col_stride]);
  });
}

// cap_and_slope, + bias. Kernels whose warps share no key are not asked for a bias.
template <DecodeConfig C>
FLASH_DEVICE void modify_scores(typename WarpTile<C>::Scores& rS, const ScoreParams& p,
                                const DecodePlace<C>& here, int first_key) {
  cap_and_slope<C>(rS, p, here, first_key);
  if constexpr (C.tile().warps_share_keys) {
    if (p.bias.ptr == nullptr) return;
    if (p.bias.dtype == Dtype::kFloat32) {
      add_bias<C, float>(rS, p.bias, here, first_key, [](float x) { return x; });
    } else {  // otherwise the dtype of q
      add_bias<C, uint16_t>(rS, p.bias, here, first_key, to_float<C.dtype>);
    }
  }
}

// rP: 0 where dropout drops. The lane's rows may be of different heads: a call of Philox for each,
// which serves 32 keys, and of which those of one block are taken.
template <DecodeConfig C>
FLASH_DEVICE void drop(typename WarpTile<C>::Probabilities& rP, const Dropout& dropout, int heads,
                       const DecodePlace<C>& here, int first_key) {
  static_assert(C.tile().n == 16);
  const int lane = ptx::read_tid_x() % 32;
  const uint32_t threshold = dropout.keep_threshold * 0x01010101u;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = min(ptx::accumulator_element(lane, 2 * half).row, here.rows - 1);
    const int query = here.query(row);
    const Philox4 random = dropout.random(here.batch * heads + here.head(row), query,
                                          first_key / 32, lane % 4, MultiplyWideInPtx{});
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint32_t bytes = first_key % 32 == 0 ? random.x[n] : random.x[n + 2];
      const uint32_t kept = at_most(bytes, threshold) >> (query / 8 % 2 * 16);
      rP[0][n][half] &= ptx::prmt<0x9988>(kept);
    }
  }
}

}  // namespace flash::sm80
