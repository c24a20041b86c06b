// What a task of the backward holds besides its head, whatever its products: a chunk of keys, its
// turns at dQ, and the step from scores to P and dS.
#pragma once

#include <sched.h>

#include "cpu/exp2_bf16.h"
#include "cpu/far_rows.h"
#include "cpu/plan.h"
#include "cpu/task_context.h"

namespace flash::cpu::FLASH_ATTN_ISA {

struct BwdTile {
  int rows, keys;  // of a block of rows, of a chunk of keys
};

// Waits until *counter == value, which another thread will set.
inline void wait_for(const int* counter, int value) {
  for (int spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) != value; ++spins)
    if (spins > 1000) sched_yield();
}

// A head's slot while it is in flight.
struct DqSlot {
  float* sums = nullptr;  // [rows, a multiple of the tile's][d_pad]
  int* turns = nullptr;   // of each block of rows: chunks that have added to it
};

// Of one row of scores.
struct ScoreScratch {
  float* cap_slope;       // derivative of the softcap
  const uint8_t* random;  // dropout's bytes
};

// Rows [row0, row0 + rows) of a head, its block number `index`.
struct RowBlock {
  int index, row0, rows;
  KeyRange chunks;  // of keys, that the rows see
};

inline RowBlock row_block(const RowMap& map, const BwdTile& tile, int index) {
  const int row0 = index * tile.rows;
  const int rows = map.rows() - row0 < tile.rows ? map.rows() - row0 : tile.rows;
  const KeyRange seen = map.keys(row0, row0 + rows - 1);
  if (seen.end <= seen.begin) return {index, row0, rows, {0, 0}};
  return {index, row0, rows, {seen.begin / tile.keys, (seen.end - 1) / tile.keys + 1}};
}

// Elements from softmax_d's start to a sequence's first query.
inline int64_t dsoftmax_offset(const Flash_bwd_params& p, const Sequence& seq, int64_t head) {
  const int64_t first = p.cu_seqlens_q ? p.cu_seqlens_q[seq.batch] + 128 * int64_t{seq.batch} : 0;
  return seq.batch * p.dsoftmax_batch_stride + head * p.dsoftmax_head_stride + first;
}

struct BwdContext : TaskContext<Flash_bwd_params> {
  // score_scale: scores / products.
  BwdContext(const Flash_bwd_params& params, const BwdHead& head, int chunk, const BwdTile& tile,
             const FarRows& far_rows, const DqSlot& dq, float score_scale)
      : TaskContext(params, head.batch, head.head_k),
        tile(tile),
        chunk(chunk),
        key(chunk * tile.keys),
        keys(seq.seqlen_k - key < tile.keys ? seq.seqlen_k - key : tile.keys),
        far_rows(far_rows),
        dq(dq),
        score_scale(score_scale) {}

  // From the last to the first: f(block) for those that see the chunk.
  template <class F>
  void for_blocks(F f) const {
    for (int i = (map.rows() + tile.rows - 1) / tile.rows - 1; i >= 0; --i) {
      const RowBlock block = row_block(map, tile, i);
      if (block.chunks.begin <= chunk && chunk < block.chunks.end) f(block);
    }
  }

  bool is_first(const RowBlock& block) const { return chunk == block.chunks.begin; }
  float* dq_row(int row) const { return dq.sums + int64_t{row} * d_pad; }
  // All chunks before this one have added to the block's sums.
  void wait_for_turn(const RowBlock& block) const {
    wait_for(dq.turns + block.index, chunk - block.chunks.begin);
  }
  // So has this one. After the last dq is complete; sums(row) is a row of it.
  template <class Sums>
  void end_turn(const RowBlock& block, Sums sums) const {
    if (chunk == block.chunks.end - 1) {
      for (int row = block.row0; row < block.row0 + block.rows; ++row)
        write_row(p.dtype, map.tensor_row(p.dq, row), sums(row), d, p.scale_softmax);
    }
    __atomic_store_n(dq.turns + block.index, chunk - block.chunks.begin + 1, __ATOMIC_RELEASE);
  }

  void end_turn(const RowBlock& block) const {
    end_turn(block, [this](int row) { return dq_row(row); });
  }

  // Row `j` of the chunk in dk or dv.
  void write_gradient(const Operand& gradient, int j, const float* row, int dim,
                      float scale = 1.f) const {
    const int64_t index = seq.k_row + seq.leftpad + key + j;
    write_row(p.dtype, operand_row(gradient, p.dtype, seq.k_batch, index, head_k), row, dim, scale);
  }

  float lse(int row) const { return p.softmax_lse[map.lse_index(row)]; }
  float delta(const Row& row) const {
    return p.dsoftmax_sum[dsoftmax_offset(p, seq, row.head) + row.query];
  }

  // Adds a row of products to a softmax state; uses them up.
  void add_row(const Row& row, float* s, const TileColumns& t, RowState& state) const {
    finish_scores(row, s, t, score_scale);
    flash_step(s, t.begin, t.end, state);
  }

  // What is left to subtract from a row's scores to have the logarithm of P.
  float subtract_reference(int row_index, const Row& row, float* s, const TileColumns& t) const {
    const float row_lse = lse(row_index);
    if (!is_far(row_lse)) return row_lse;
    const RowReference& reference = far_rows.at(seq.batch, row.head, row.query);
    for (int j = t.begin; j < t.end; j += kWidth) store(s + j, load(s + j) - set1(reference.score));
    return reference.log_sum;
  }

  // A row's products s = q.k and dp = dO.v become P, with dropout, and dS. With kForBf16, P will be
  // rounded to bf16.
  template <bool kForBf16 = false>
  void softmax_bwd_step(int row_index, const Row& row, float* s, float* dp, const TileColumns& t,
                        const ScoreScratch& x) const {
    float* cap_slope = p.softcap > 0.f ? x.cap_slope : nullptr;
    modify(row, s, t, score_scale, cap_slope);
    const Vec reference = set1(subtract_reference(row_index, row, s, t));
    const Vec row_delta = set1(delta(row));
    for (int j = t.begin; j < t.end; j += kWidth) {
      const Vec exponent = load(s + j) - reference;
      const Vec weight = kForBf16 ? exp2_bf16(exponent * kLog2e) : exp(exponent);
      Vec dropped = weight, dp_j = load(dp + j);
      if (dropout.enabled) {
        const auto keep = kept(dropout, x.random, j);
        dropped = select(keep, weight * dropout.rescale, zero());
        dp_j = select(keep, dp_j * dropout.rescale, zero());
      }
      store(s + j, dropped);
      store(dp + j, weight * (dp_j - row_delta));
    }
    if (p.dbias.ptr) add_dbias(row, dp, t);
    if (cap_slope)
      for (int j = t.begin; j < t.end; j += kWidth)
        store(dp + j, load(dp + j) * load(cap_slope + j));
  }

  void add_dbias(const Row& row, const float* ds, const TileColumns& t) const {
    const Bias& bias = p.dbias;
    const KeyRange seen = visible(row, t);
    float* dst =
        static_cast<float*>(bias.ptr) + map.bias_offset(bias, row) + t.first_key * bias.col_stride;
    int j = seen.begin;
    if (bias.col_stride == 1)
      for (; j + kWidth <= seen.end; j += kWidth) store(dst + j, load(dst + j) + load(ds + j));
    for (; j < seen.end; ++j) dst[j * bias.col_stride] += ds[j];
  }

  const BwdTile& tile;
  const int chunk, key, keys;  // its number, first key, number of keys
  const FarRows& far_rows;
  const DqSlot dq;
  const float score_scale;
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
