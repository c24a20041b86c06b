// Backward attention of one call: prepares the rows, cuts the work into tasks and runs them.
#pragma once

#include "base/cpu/parallel.h"
#include "cpu/bwd_context.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// Those of the heads in flight, and when they pass from one to the next.
struct DqSlots {
  float* sums;        // [wave_heads][max_rows rounded up to the tile][d_pad]
  int64_t slot_size;  // floats
  int* turns;         // [wave_heads][row blocks]
  int64_t row_blocks;
  int* chunks_done;  // [heads]
  int* head_done;    // [heads]: 1 once the head's slot is free again

  DqSlot of(int slot) const { return {sums + slot * slot_size, turns + slot * row_blocks}; }
};

inline constexpr int kPrefetchedRows = 16;

// a . b, of d elements.
template <Dtype T>
inline float dot(const void* a, const void* b, int d) {
  Vec sum[2] = {};
  int i = 0;
  for (; i + 2 * kWidth <= d; i += 2 * kWidth)
    for (int j = 0; j < 2; ++j)
      sum[j] =
          fma(load_as_float<T>(a, i + j * kWidth), load_as_float<T>(b, i + j * kWidth), sum[j]);
  for (; i + kWidth <= d; i += kWidth)
    sum[0] = fma(load_as_float<T>(a, i), load_as_float<T>(b, i), sum[0]);
  if (i < d) sum[1] = fma(load_tail<T>(a, i, d - i), load_tail<T>(b, i, d - i), sum[1]);
  return reduce_add(sum[0] + sum[1]);
}

// softmax_d = rowsum(dO * O) - dlse of a block of rows; dq of blocks that see no key is 0. True if
// any row is far.
inline bool prepare_rows(const Flash_bwd_params& p, const Sequence& seq, int head_k, int row0,
                         const BwdTile& tile) {
  const RowMap map(p, seq, head_k);
  const int end = map.rows() - row0 < tile.rows ? map.rows() : row0 + tile.rows;
  const KeyRange seen = map.keys(row0, end - 1);
  bool far = false;
  for (int row = row0; row < end; ++row) {
    far |= is_far(p.softmax_lse[map.lse_index(row)]);
    float delta = 0.f;
    if (row + kPrefetchedRows < end) {
      prefetch_row<2>(p.dtype, map.tensor_row(p.o, row + kPrefetchedRows), p.d_v);
      prefetch_row<2>(p.dtype, map.tensor_row(p.dout, row + kPrefetchedRows), p.d_v);
    }
    with_dtype(p.dtype, [&]<Dtype T>() {
      delta =
          dot<T>(map.tensor_row(p.o, row), map.tensor_row(p.dout, row), static_cast<int>(p.d_v));
    });
    const int64_t head = map.head(row), query = map.query(row);
    if (p.dlse)
      delta -= p.dlse[seq.batch * p.dlse_batch_stride + head * p.dlse_head_stride +
                      (seq.lse_row + query) * p.dlse_row_stride];
    p.dsoftmax_sum[dsoftmax_offset(p, seq, head) + query] = delta;
    if (seen.end <= seen.begin) zero_row(p.dtype, map.tensor_row(p.dq, row), p.d);
  }
  return far && seen.begin < seen.end;
}

// The weight of `sink` in a row of a head whose softmax_lse is `lse`.
inline float sink_weight(float sink, float lse, const FarRows& far_rows, int batch, int head,
                         int query) {
  if (!is_far(lse) || far_rows.references == nullptr) return exp(sink - lse);
  const RowReference& reference = far_rows.at(batch, head, query);
  return exp((sink - reference.score) - reference.log_sum);
}

// The sink is a key with value 0: its gradient is sum over queries of weight (0 - delta).
inline void store_ds_aux(const Flash_bwd_params& p, int head, const FarRows& far_rows) {
  const float sink = sink_logit(p, head);
  float sum = 0.f;
  for (int b = 0; b < p.b; ++b) {
    const Sequence seq = sequence(p, b);
    const float* lse =
        p.softmax_lse + b * p.lse_batch_stride + head * p.lse_head_stride + seq.lse_row;
    const float* delta = p.dsoftmax_sum + dsoftmax_offset(p, seq, head);
    for (int i = 0; i < seq.seqlen_q; ++i)
      sum -= sink_weight(sink, lse[i], far_rows, b, head, i) * delta[i];
  }
  p.ds_aux[head] = sum;
}

inline void zero_dbias(const Bias& x, int threads) {
  parallel_for(x.b * x.h, threads, [&](int64_t i, int) {
    float* head = static_cast<float*>(x.ptr) + i / x.h * x.batch_stride + i % x.h * x.head_stride;
    for (int64_t row = 0; row < x.rows; ++row, head += x.row_stride) {
      if (x.col_stride == 1)
        std::memset(head, 0, x.cols * sizeof(float));
      else
        for (int64_t j = 0; j < x.cols; ++j) head[j * x.col_stride] = 0.f;
    }
  });
}

inline void zero_softmax_d(const Flash_bwd_params& p) {
  const int64_t entries = p.cu_seqlens_q ? 1 : p.b;
  const int64_t columns = p.cu_seqlens_q ? p.total_q + 128 * p.b : (p.seqlen_q + 127) / 128 * 128;
  for (int64_t b = 0; b < entries && columns > 0; ++b)
    for (int64_t h = 0; h < p.h; ++h)
      std::memset(p.dsoftmax_sum + b * p.dsoftmax_batch_stride + h * p.dsoftmax_head_stride, 0,
                  columns * sizeof(float));
}

// True if any row is far.
inline bool prepare_bwd(const Flash_bwd_params& p, const BwdPlan& plan, const BwdTile& tile,
                        int threads) {
  zero_softmax_d(p);
  if (p.dbias.ptr) zero_dbias(p.dbias, threads);
  const int64_t blocks = (plan.max_rows + tile.rows - 1) / tile.rows;
  bool any_far = false;
  parallel_for(p.b * p.h_k * blocks, threads, [&](int64_t i, int) {
    const int head = static_cast<int>(i / blocks);
    const Sequence seq = sequence(p, static_cast<int>(head / p.h_k));
    const int row0 = static_cast<int>(i % blocks) * tile.rows;
    if (row0 >= seq.seqlen_q * (p.h / p.h_k)) return;
    if (prepare_rows(p, seq, static_cast<int>(head % p.h_k), row0, tile))
      __atomic_store_n(&any_far, true, __ATOMIC_RELAXED);
  });
  return any_far;
}

// References of the far rows of a block.
template <class Runner>
inline void find_references(const Flash_bwd_params& p, const BwdHead& head, int block_index,
                            const BwdTile& tile, const typename Runner::Scratch& x,
                            RowState* states, const FarRows& far_rows) {
  const Sequence seq = sequence(p, head.batch);
  const RowMap map(p, seq, head.head_k);
  const RowBlock block = row_block(map, tile, block_index);
  const auto lse = [&](int r) { return p.softmax_lse[map.lse_index(block.row0 + r)]; };
  bool any_far = false;
  for (int r = 0; r < block.rows; ++r) any_far |= is_far(lse(r));
  if (!any_far) return;
  for (int r = 0; r < block.rows; ++r) states[r] = RowState{};
  for (int chunk = block.chunks.begin; chunk < block.chunks.end; ++chunk)
    Runner(p, head, chunk, tile, x, far_rows, DqSlot{}).add_scores(block, states);
  for (int r = 0; r < block.rows; ++r) {
    const Row row = map.row(block.row0 + r);
    if (p.s_aux) add_sink(p, row.head, states[r]);
    if (is_far(lse(r)))
      far_rows.at(seq.batch, row.head, row.query) = far_reference(states[r], lse(r));
  }
}

template <class Runner>
inline void find_far_rows(const Flash_bwd_params& p, const BwdPlan& plan, const BwdTile& tile,
                          int threads, const FarRows& far_rows) {
  Carver measure(nullptr);
  measure.take<RowState>(tile.rows);
  Runner::carve(measure, p, tile);
  Scratch scratch(measure.used() * threads);
  const int64_t blocks = (plan.max_rows + tile.rows - 1) / tile.rows;
  parallel_for(static_cast<int64_t>(plan.heads.size()) * blocks, threads,
               [&](int64_t i, int thread) {
                 const BwdHead& head = plan.heads.data()[i / blocks];
                 const int block = static_cast<int>(i % blocks);
                 if (block * tile.rows >= sequence(p, head.batch).seqlen_q * (p.h / p.h_k)) return;
                 Carver carver(scratch.data() + measure.used() * thread);
                 RowState* states = carver.take<RowState>(tile.rows);
                 const typename Runner::Scratch x = Runner::carve(carver, p, tile);
                 find_references<Runner>(p, head, block, tile, x, states, far_rows);
               });
}

inline DqSlots carve_slots(Carver& c, const Flash_bwd_params& p, const BwdPlan& plan,
                           const BwdTile& tile) {
  DqSlots x;
  x.row_blocks = (plan.max_rows + tile.rows - 1) / tile.rows;
  x.slot_size = x.row_blocks * tile.rows * HeadDims(p).d_pad;
  x.turns = c.take<int>(plan.wave_heads * x.row_blocks);
  x.chunks_done = c.take<int>(static_cast<int64_t>(plan.heads.size()));
  x.head_done = c.take<int>(static_cast<int64_t>(plan.heads.size()));
  x.sums = c.take<float>(plan.wave_heads * x.slot_size);
  return x;
}

inline void reset(const DqSlots& slots, const BwdPlan& plan) {
  std::memset(slots.turns, 0, plan.wave_heads * slots.row_blocks * sizeof(int));
  std::memset(slots.chunks_done, 0, plan.heads.size() * sizeof(int));
  std::memset(slots.head_done, 0, plan.heads.size() * sizeof(int));
}

template <class Runner>
inline void run_bwd_tasks(const Flash_bwd_params& p, const BwdPlan& plan, const BwdTile& tile,
                          int threads, const FarRows& far_rows) {
  Carver measure(nullptr);
  Runner::carve(measure, p, tile);
  const size_t thread_bytes = measure.used();
  carve_slots(measure, p, plan, tile);
  Scratch scratch(thread_bytes * (threads - 1) + measure.used());
  Carver shared(scratch.data() + thread_bytes * threads);
  const DqSlots slots = carve_slots(shared, p, plan, tile);
  reset(slots, plan);
  // A bias gradient broadcast over keys is shared by the chunks of a head, which then run one after
  // the other.
  const bool chunks_share_bias = p.dbias.ptr && p.dbias.cols < p.seqlen_k;
  const BwdHead* heads = plan.heads.data();
  const BwdTask* tasks = plan.tasks.data();
  parallel_for(static_cast<int64_t>(plan.tasks.size()), threads, [&](int64_t i, int thread) {
    const int h = tasks[i].head, slot = h % plan.wave_heads;
    Carver carver(scratch.data() + thread_bytes * thread);
    const typename Runner::Scratch x = Runner::carve(carver, p, tile);
    if (h >= plan.wave_heads) wait_for(slots.head_done + h - plan.wave_heads, 1);
    if (chunks_share_bias) wait_for(slots.chunks_done + h, tasks[i].chunk);
    const DqSlot dq = slots.of(slot);
    Runner(p, heads[h], tasks[i].chunk, tile, x, far_rows, dq).run();
    if (__atomic_add_fetch(slots.chunks_done + h, 1, __ATOMIC_ACQ_REL) == heads[h].chunks) {
      std::memset(dq.turns, 0, slots.row_blocks * sizeof(int));
      __atomic_store_n(slots.head_done + h, 1, __ATOMIC_RELEASE);
    }
  });
}

inline void zero_rows_of_no_sequence(const Flash_bwd_params& p) {
  zero_rows_beyond(p.dq, p.dtype, p.cu_seqlens_q[p.b], p.total_q, p.h, p.d);
  zero_rows_beyond(p.dk, p.dtype, p.cu_seqlens_k[p.b], p.total_k, p.h_k, p.d);
  zero_rows_beyond(p.dv, p.dtype, p.cu_seqlens_k[p.b], p.total_k, p.h_k, p.d_v);
}

// Runner does one task: BwdTaskRunner, BwdTilesRunner.
template <class Runner>
inline void mha_bwd(const Flash_bwd_params& p) {
  const BwdTile tile = Runner::tile(p);
  const BwdPlan plan = plan_bwd(p, tile.keys, num_threads());
  const int threads = threads_for(plan.flops);
  const auto run = [&](const FarRows& far_rows) {
    run_bwd_tasks<Runner>(p, plan, tile, threads, far_rows);
    if (p.ds_aux)
      parallel_for(p.h, threads,
                   [&](int64_t h, int) { store_ds_aux(p, static_cast<int>(h), far_rows); });
  };
  if (prepare_bwd(p, plan, tile, threads)) {
    Scratch references(p.b * p.h * p.seqlen_q * sizeof(RowReference));
    const FarRows far_rows{reinterpret_cast<RowReference*>(references.data()), p.h, p.seqlen_q};
    find_far_rows<Runner>(p, plan, tile, threads, far_rows);
    run(far_rows);
  } else {
    run(FarRows{});
  }
  if (p.cu_seqlens_q) zero_rows_of_no_sequence(p);
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
