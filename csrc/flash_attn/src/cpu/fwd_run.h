// Forward attention of one call: cuts it into tasks, runs them, and finishes or merges their rows.
#pragma once

#include "base/cpu/parallel.h"
#include "cpu/decode.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// out = O / sum and softmax_lse of one row, the sink included. A row without keys: out = 0,
// softmax_lse = +inf.
inline void store_row(const Flash_fwd_params& p, const RowMap& map, int row, RowState state,
                      float* o) {
  const float scale = p.s_aux ? add_sink(p, map.head(row), state) : 1.f;
  const float rescale = 1.f / (1.f - p.p_dropout);
  write_row(p.o_dtype, map.out_row(row), o, static_cast<int>(p.d_v),
            scale * rescale * state.inverse_sum());
  if (p.softmax_lse) p.softmax_lse[map.lse_index(row)] = state.lse(1.f);
}

// Partial results of split keys: the states of all rows, then their unscaled O rows.
struct Partials {
  RowState* state;
  float* o;
  int64_t o_ld;
};

// Rows of one of the task's heads are complete, or are parts to merge.
inline void finish_rows(const Flash_fwd_params& p, const Sequence& seq, const FwdTask& task,
                        int head, const RowState* state, float* o, const Partials& partials) {
  const RowMap map(p, seq, task.head_k + head);
  const int rows = task.row_end - task.row_begin;
  const int64_t base = task.partial_row + int64_t{head} * task.num_splits * rows;
  for (int r = 0; r < rows; ++r) {
    if (task.num_splits == 1) {
      store_row(p, map, task.row_begin + r, state[r], o + r * partials.o_ld);
    } else {
      partials.state[base + r] = state[r];
      std::memcpy(partials.o + (base + r) * partials.o_ld, o + r * partials.o_ld,
                  partials.o_ld * sizeof(float));
    }
  }
}

template <class Runner>
inline void run_task(const Flash_fwd_params& p, const FwdTask& task, const FwdTile& tile,
                     Carver& carver, const Partials& partials) {
  const int rows = task.row_end - task.row_begin;
  const Sequence seq = sequence(p, task.batch);
  if (task.streamed) {
    const StreamScratch x = carve_stream(carver, p);
    with_input_dtype(p.kv_dtype, [&]<Dtype T>() { StreamTaskRunner<T>(p, task, x).run(); });
    for (int h = 0; h < task.heads; ++h)
      finish_rows(p, seq, task, h, x.state + h * rows, x.o + h * rows * partials.o_ld, partials);
  } else {
    const typename Runner::Scratch x = Runner::carve(carver, p, tile);
    Runner(p, task, tile, x).run();
    finish_rows(p, seq, task, 0, x.state, x.o, partials);
  }
}

// Scratch of one thread, enough for any task.
template <class Runner>
inline size_t fwd_scratch_bytes(const Flash_fwd_params& p, const FwdTile& tile) {
  Carver packed(nullptr), streamed(nullptr);
  Runner::carve(packed, p, tile);
  if (tile.stream.rows > 0) carve_stream(streamed, p);
  return packed.used() > streamed.used() ? packed.used() : streamed.used();
}

// Merges the parts of one row in order into the first, and stores it.
inline void merge_row(const Flash_fwd_params& p, const FwdTask& first, int head, int r,
                      const Partials& x) {
  const Sequence seq = sequence(p, first.batch);
  const int64_t stride = first.row_end - first.row_begin;
  const int64_t base = first.partial_row + head * first.num_splits * stride + r;
  RowState total = x.state[base];
  float* o = x.o + base * x.o_ld;
  for (int split = 1; split < first.num_splits; ++split) {
    const RowState part = x.state[base + split * stride];
    const float* o_part = x.o + (base + split * stride) * x.o_ld;
    const MergeFactors factors = merge(total, part, natural_power);
    for (int i = 0; i < x.o_ld; i += kWidth)
      store(o + i, fma(set1(factors.part), load(o_part + i), load(o + i) * factors.total));
  }
  store_row(p, RowMap(p, seq, first.head_k + head), first.row_begin + r, total, o);
}

inline void merge_parts(const Flash_fwd_params& p, const FwdPlan& plan, const Partials& partials) {
  const double merge_flops = 4.0 * plan.partial_rows * partials.o_ld;
  const FwdTask* tasks = plan.tasks.data();
  parallel_for(static_cast<int64_t>(plan.tasks.size()), threads_for(merge_flops),
               [&](int64_t i, int) {
                 const FwdTask& task = tasks[i];
                 if (task.num_splits == 1 || task.split > 0) return;
                 for (int h = 0; h < task.heads; ++h)
                   for (int r = 0; r < task.row_end - task.row_begin; ++r)
                     merge_row(p, task, h, r, partials);
               });
}

inline void store_rows_of_no_sequence(const Flash_fwd_params& p) {
  const int64_t used = p.cu_seqlens_q[p.b];
  zero_rows_beyond(p.o, p.o_dtype, used, p.total_q, p.h, p.d_v);
  for (int64_t h = 0; h < p.h && p.softmax_lse; ++h)
    for (int64_t i = used; i < p.total_q; ++i) p.softmax_lse[h * p.lse_head_stride + i] = -kInf;
}

// Runner does the tasks that are not streamed: FwdTaskRunner, FwdTilesRunner.
template <class Runner>
inline void mha_fwd(const Flash_fwd_params& p) {
  if (p.knew.ptr) append_kv(p);
  const FwdTile tile = Runner::tile(p);
  const FwdPlan plan = plan_fwd(p, tile, num_threads());
  const int threads = threads_for(plan.flops);
  const int64_t o_ld = HeadDims(p).d_v_pad;

  const size_t thread_bytes = fwd_scratch_bytes<Runner>(p, tile);
  const size_t partial_bytes = plan.partial_rows * (o_ld * sizeof(float) + sizeof(RowState)) + 128;
  Scratch scratch(thread_bytes * threads + partial_bytes);
  Carver shared(scratch.data() + thread_bytes * threads);
  const Partials partials{shared.take<RowState>(plan.partial_rows),
                          shared.take<float>(plan.partial_rows * o_ld), o_ld};

  const FwdTask* tasks = plan.tasks.data();
  parallel_for(static_cast<int64_t>(plan.tasks.size()), threads, [&](int64_t i, int thread) {
    Carver carver(scratch.data() + thread_bytes * thread);
    run_task<Runner>(p, tasks[i], tile, carver, partials);
  });
  if (plan.partial_rows > 0) merge_parts(p, plan, partials);
  if (p.cu_seqlens_q) store_rows_of_no_sequence(p);
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
