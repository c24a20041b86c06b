// The gradient of an additive bias: dS before the softcap's slope, P * (dP - delta), summed over
// the dimensions along which the bias was broadcast.
//
// A CTA owns m queries x n keys of one batch entry and head of the bias, or all of a dimension that
// the bias does not have, and walks over everything that they were added to, in a fixed order: sums
// in fp32, the same at every run. It computes the scores anew, two products of the backward's five,
// with the main kernel's tiles; what lies outside a mask or a sequence gets 0.
#pragma once

#include "base/ptx/cp_async.h"
#include "common/bounded_sequence.h"
#include "sm80/bwd_scores.h"

namespace flash::sm80 {

// What a CTA adds up: [begin, end) of batch entries, query heads, blocks of queries and of keys.
struct BiasBlocks {
  int batch, batch_end, head, head_end;
  int q_block, q_block_end, key_block, key_block_end;
};

// A dimension of which the bias has `extent` entries, cut into blocks of `size`: the bias's own
// block `index` of them, or all that there are in `all` entries if it is broadcast.
FLASH_DEVICE void range_of(int64_t extent, int64_t all, int size, int index, int& begin, int& end) {
  const int blocks = static_cast<int>((all + size - 1) / size);
  begin = extent == 1 ? 0 : index;
  end = extent == 1 ? blocks : index + 1;
}

// This CTA's; its number counts blocks of keys first, then of queries, heads, batch entries.
template <BwdConfig C>
FLASH_DEVICE BiasBlocks bias_blocks(const BwdParams& p) {
  const Bias& bias = p.dbias;
  int rest = ptx::read_ctaid_x();
  const auto take = [&](int64_t extent, int size) {
    const int blocks = static_cast<int>((extent + size - 1) / size);
    const int index = rest % blocks;
    rest /= blocks;
    return index;
  };
  BiasBlocks x;
  range_of(bias.cols, p.seqlen_k, C.tile().n, take(bias.cols, C.tile().n), x.key_block,
           x.key_block_end);
  range_of(bias.rows, p.seqlen_q, C.tile().m, take(bias.rows, C.tile().m), x.q_block,
           x.q_block_end);
  range_of(bias.h, p.h, 1, take(bias.h, 1), x.head, x.head_end);
  range_of(bias.b, p.b, 1, take(bias.b, 1), x.batch, x.batch_end);
  return x;
}

// Adds dS of a block to this warp's sums.
template <BwdConfig C>
FLASH_DEVICE void add_slopes(typename WarpTile<C>::Scores& sums, uint32_t smem, const BwdParams& p,
                             const BwdLaunch& launch, const KeyTile& here,
                             const QueryBlock& queries) {
  using Plan = BwdSmemPlan<C>;
  const uint32_t stage = smem + offsetof(Plan, stages);
  fetch_keys<C>(smem, p, launch, here);
  fetch<C>(stage, p, launch, here, queries);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  __syncthreads();
  BwdScores<C> scores(smem, stage, this_warp<C>(), this_lane<C>());
  scores.template modify<false>(stage, p, launch, here, queries);
  scores.softmax_bwd_step(launch, here, queries, false,
                          [&](int m, int n, int half, const float*, const float* slope) {
                            sums[m][n][2 * half] += slope[0];
                            sums[m][n][2 * half + 1] += slope[1];
                          });
  __syncthreads();
}

// Writes a block of sums, which lies in shared memory [m][n], or the sums of its rows, columns or
// both where the bias has none.
template <BwdConfig C>
FLASH_DEVICE void store_bias_gradient(const float* sums, const Bias& bias, const BiasBlocks& here) {
  constexpr int kM = C.tile().m, kN = C.tile().n;
  const bool has_rows = bias.rows > 1, has_cols = bias.cols > 1;
  float* first =
      static_cast<float*>(bias.ptr) + here.batch * bias.batch_stride + here.head * bias.head_stride;
  const int rows = has_rows ? kM : 1, cols = has_cols ? kN : 1;
  for (int i = threadIdx.x; i < rows * cols; i += C.threads()) {
    const int row = i / cols, col = i % cols;
    const int64_t bias_row = has_rows ? here.q_block * kM + row : 0;
    const int64_t bias_col = has_cols ? here.key_block * kN + col : 0;
    if (bias_row >= bias.rows || bias_col >= bias.cols) continue;
    float sum = 0.f;
    for (int r = row; r < (has_rows ? row + 1 : kM); ++r)
      for (int c = col; c < (has_cols ? col + 1 : kN); ++c) sum += sums[r * kN + c];
    first[bias_row * bias.row_stride + bias_col * bias.col_stride] = sum;
  }
}

template <BwdConfig C>
FLASH_DEVICE void bias_gradient(const BwdParams& p, const BwdLaunch& launch) {
  using Plan = BwdSmemPlan<C>;
  constexpr int kM = C.tile().m, kN = C.tile().n;
  extern __shared__ __align__(1024) char memory[];
  const uint32_t smem = ptx::shared_address(memory);
  KeyTile& here = reinterpret_cast<Plan*>(memory)->tile;
  const BiasBlocks blocks = bias_blocks<C>(p);

  typename WarpTile<C>::Scores sums;
  clear(sums);
  for (int batch = blocks.batch; batch < blocks.batch_end; ++batch) {
    IndexFaults faults;  // the main kernel reports them
    const Sequence seq = bounded_sequence(p, batch, launch.bounds.max_cached, faults);
    const Mask mask = mask_of(p, seq);
    for (int head = blocks.head; head < blocks.head_end; ++head) {
      for (int q_block = blocks.q_block; q_block < blocks.q_block_end; ++q_block) {
        const BlockRange seen = block_range(mask, q_block * kM, q_block * kM + kM - 1, kN);
        for (int key_block = max(blocks.key_block, seen.begin);
             key_block < min(blocks.key_block_end, seen.end); ++key_block) {
          if (threadIdx.x == 0) {
            here.seq = seq;
            here.mask = mask;
            here.head_k = head / launch.group;
            here.key_block = key_block;
            here.first_key = key_block * kN;
          }
          __syncthreads();
          add_slopes<C>(sums, smem, p, launch, here, {head, q_block});
        }
      }
    }
  }

  static_assert(sizeof(float) * kM * kN <= offsetof(Plan, tile));
  const ScoreTile<C> part(this_warp<C>());
  auto* block = reinterpret_cast<float*>(memory);
  for_each<C>(sums, [&](float x, int m, int n, int i) {
    const ptx::Element at = ptx::accumulator_element(this_lane<C>(), i);
    block[(part.row + m * 16 + at.row) * kN + part.key + n * 8 + at.col] = x;
  });
  __syncthreads();
  store_bias_gradient<C>(block, p.dbias, blocks);
}

}  // namespace flash::sm80
