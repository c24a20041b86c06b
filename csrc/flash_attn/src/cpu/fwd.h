// Forward attention, FlashAttention-2 (arXiv:2307.08691) algorithm 1, for one instruction set.
//
// A task owns up to task_rows rows (queries x GQA group) of one key-value head and walks over key
// blocks:
//
//   pack K^T and V of the block to fp32 panels      once a task and block: 2 d bytes_in + 8 d bytes
//   written a key for each tile of rows:
//     S = Q K^T        gemm_qk        2 rows keys d flops, Q in L2, a K panel in L1
//     mask, softmax    softmax_step   on the visible columns only, S stays in L1/L2
//     O = a O + P V    gemm_pv        2 rows keys dv flops, a = 2^(old max - new max) folded into
//     the first use of O
//
// Groups of kTileM rows know which columns any of them sees; products and softmax touch nothing
// else, so causal and windowed work is proportional to the visible scores. A row's arithmetic
// depends on its own position only: neither on the task it falls into nor on the number of threads.
#pragma once

#include "base/cpu/parallel.h"
#include "cpu/decode.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr int kFwdTileRows = 4 * kTileM;

inline FwdTile fwd_tile(const Flash_fwd_params& p) {
  const int bytes_a_row =
      4 * (round_up(static_cast<int>(p.d), kTileN) + round_up(static_cast<int>(p.d_v), kTileN));
  int keys = (192 << 10) / bytes_a_row / 32 * 32;
  keys = keys < 32 ? 32 : keys > 256 ? 256 : keys;
  int task_rows = (512 << 10) / bytes_a_row / kFwdTileRows * kFwdTileRows;
  task_rows = task_rows < kFwdTileRows ? kFwdTileRows : task_rows;
  return {kFwdTileRows, keys, task_rows, stream_tile(p)};
}

struct FwdScratch {
  float *q, *o;      // [task_rows][d], [task_rows][dv], padded to kTileN
  float *k, *v;      // packed key block
  float* s;          // [tile.rows][tile.keys]
  float* buffer;     // a packing panel, or a row of bias
  float* row_scale;  // [tile.rows]
  RowState* state;   // [task_rows]
  Row* rows;         // [task_rows]
  uint8_t* random;   // [tile.keys]
};

inline FwdScratch carve_fwd(Carver& c, const Flash_fwd_params& p, const FwdTile& tile) {
  const int64_t d = round_up(static_cast<int>(p.d), kTileN),
                dv = round_up(static_cast<int>(p.d_v), kTileN);
  FwdScratch x;
  x.q = c.take<float>(tile.task_rows * d);
  x.o = c.take<float>(tile.task_rows * dv);
  x.k = c.take<float>(tile.keys * d);
  x.v = c.take<float>(tile.keys * dv);
  x.s = c.take<float>(static_cast<int64_t>(tile.rows) * tile.keys);
  x.buffer = c.take<float>((d > dv ? d : dv) * kTileN + tile.keys + kWidth);
  x.row_scale = c.take<float>(tile.rows);
  x.state = c.take<RowState>(tile.task_rows);
  x.rows = c.take<Row>(tile.task_rows);
  x.random = c.take<uint8_t>(tile.keys + 64);
  return x;
}

class FwdTaskRunner {
 public:
  using Scratch = FwdScratch;
  static FwdTile tile(const Flash_fwd_params& p) { return fwd_tile(p); }
  static Scratch carve(Carver& c, const Flash_fwd_params& p, const FwdTile& tile) {
    return carve_fwd(c, p, tile);
  }

  FwdTaskRunner(const Flash_fwd_params& p, const FwdTask& task, const FwdTile& tile,
                const FwdScratch& x)
      : p_(p),
        task_(task),
        tile_(tile),
        x_(x),
        seq_(sequence(p, task.batch)),
        map_(p, seq_, task.head_k),
        d_(static_cast<int>(p.d)),
        d_v_(static_cast<int>(p.d_v)),
        d_pad_(round_up(d_, kTileN)),
        d_v_pad_(round_up(d_v_, kTileN)),
        modifiers_(has_score_modifiers(p)),
        dropout_(Dropout::make(p.p_dropout, p.seed, p.offset)) {}

  void run() {
    load_q();
    std::memset(x_.o, 0, sizeof(float) * rows() * d_v_pad_);
    if (task_.key_begin >= task_.key_end) return;
    for (int key = task_.key_begin / tile_.keys * tile_.keys; key < task_.key_end;
         key += tile_.keys) {
      const int keys = task_.key_end - key < tile_.keys ? task_.key_end - key : tile_.keys;
      pack_kv(key, keys);
      for (int row = 0; row < rows(); row += tile_.rows) attend(row, key, keys);
    }
  }

  const RowMap& map() const { return map_; }
  int rows() const { return task_.row_end - task_.row_begin; }

  // fp32 queries, rotated and scaled, and fresh softmax states.
  void load_q() {
    for (int r = 0; r < rows(); ++r) {
      const int row = task_.row_begin + r;
      x_.rows[r] = map_.row(row);
      x_.state[r] = RowState{};
      read_scaled_query(p_, seq_, map_, row, x_.q + int64_t{r} * d_pad_, d_pad_);
    }
  }

  void pack_kv(int key, int keys) {
    const int padded = round_up(keys, kTileN);
    const int64_t first = seq_.leftpad + key;
    const auto k_row = [&](int i) { return cache_row(p_, p_.k, seq_, first + i, task_.head_k); };
    const auto v_row = [&](int i) { return cache_row(p_, p_.v, seq_, first + i, task_.head_k); };
    pack_transposed(x_.k, p_.dtype, keys, d_, k_row, x_.buffer);
    v_finite_ = pack_natural(x_.v, p_.dtype, keys, padded, d_v_, v_row, x_.buffer);
    v_rows_ = padded;
  }

  void gemm_qk(int row, int count, const TileColumns& t, float* s, int64_t s_ld) const {
    const OperandB k = transposed_operand(x_.k + int64_t{t.begin} * d_pad_, d_);
    Product x{};
    x.k = d_;
    x.a = x_.q + int64_t{row} * d_pad_;
    x.a_ld = d_pad_;
    x.c = s + t.begin;
    x.c_ld = s_ld;
    multiply_in_pieces(count, t.end - t.begin, x, k);
  }

  // Softcap, ALiBi, bias and mask of one row. True if it sees every column.
  bool finish_scores(int r, float* s, const TileColumns& t) const {
    const Row& row = x_.rows[r];
    if (modifiers_) modify_scores(p_, map_, row, s, t, x_.buffer, nullptr);
    const KeyRange seen = visible(row, t);
    if (seen.begin == t.begin && seen.end == t.end) return true;
    fill_invisible(s, t, seen, -kInf);
    return false;
  }

  const Dropout& dropout() const { return dropout_; }

 protected:
  // One tile of rows over the packed key block; rows count from the task's first.
  void attend(int row, int key, int keys) {
    const int end = rows() - row < tile_.rows ? rows() : row + tile_.rows;
    map_.for_bands(task_.row_begin + row, task_.row_begin + end, key, keys,
                   [&](int first, int count, const TileColumns& t) {
                     if (t.begin < t.end) attend_band(first - task_.row_begin, count, t);
                   });
  }

  void attend_band(int row, int count, const TileColumns& t) {
    gemm_qk(row, count, t, x_.s, tile_.keys);
    bool all_visible = true;
    for (int r = 0; r < count; ++r)
      all_visible &= softmax_step(row + r, x_.s + int64_t{r} * tile_.keys, t, r);
    gemm_pv(row, count, t, x_.s, x_.row_scale, !v_finite_ && !all_visible);
  }

  // s -> P of one row; updates its state and the factor its O must be scaled by. True if it sees
  // every column.
  bool softmax_step(int r, float* s, const TileColumns& t, int scale_index) {
    const bool all_visible = finish_scores(r, s, t);
    x_.row_scale[scale_index] = flash_step(s, t.begin, t.end, x_.state[r]);
    if (dropout_.enabled) drop(x_.rows[r], s, t);
    return all_visible;
  }

  void drop(const Row& row, float* p, const TileColumns& t) const {
    random_row_bytes(dropout_, map_.batch_head(row), row.query, t, x_.random);
    for (int j = t.begin; j < t.end; j += kWidth)
      store(p + j, select(kept(dropout_, x_.random, j), load(p + j), zero()));
  }

  void gemm_pv(int row, int count, const TileColumns& t, const float* p, const float* scale,
               bool skip_zeros) const {
    OperandB v = natural_operand(x_.v, v_rows_);
    v.data += t.begin * kTileN;
    Product x{};
    x.k = t.end - t.begin;
    x.a = p + t.begin;
    x.a_ld = tile_.keys;
    x.c = x_.o + int64_t{row} * d_v_pad_;
    x.c_ld = d_v_pad_;
    x.init = Init::kScaleRows;
    x.row_scale = scale;
    multiply<false>(count, d_v_pad_, x, v, skip_zeros);
  }

  const Flash_fwd_params& p_;
  const FwdTask& task_;
  const FwdTile& tile_;
  const FwdScratch& x_;
  const Sequence seq_;
  const RowMap map_;
  const int d_, d_v_, d_pad_, d_v_pad_;
  const bool modifiers_;
  const Dropout dropout_;
  bool v_finite_ = true;
  int v_rows_ = 0;
};

// out = O / sum and softmax_lse of one row, the sink included. A row without keys: out = 0,
// softmax_lse = +inf.
inline void store_row(const Flash_fwd_params& p, const RowMap& map, int row, RowState state,
                      float* o) {
  const float scale = p.s_aux ? add_sink(p, map.head(row), state) : 1.f;
  const float rescale = 1.f / (1.f - p.p_dropout);
  write_row(p.dtype, map.tensor_row(p.o, row), o, static_cast<int>(p.d_v),
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
    with_dtype(p.dtype, [&]<Dtype T>() { StreamTaskRunner<T>(p, task, x).run(); });
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
    const float new_max = part.max > total.max ? part.max : total.max;
    const float reference = RowState{new_max, 0.f}.anchor();
    const float a = exp(total.max - reference), b = exp(part.max - reference);
    total = {new_max, total.sum * a + part.sum * b};
    for (int i = 0; i < x.o_ld; i += kWidth)
      store(o + i, fma(set1(b), load(o_part + i), load(o + i) * a));
  }
  store_row(p, RowMap(p, seq, first.head_k + head), first.row_begin + r, total, o);
}

// Rows of a packed batch that belong to no sequence.
inline void zero_rows_beyond(const Operand& x, Dtype t, int64_t first, int64_t total, int64_t heads,
                             int64_t d) {
  for (int64_t i = first; i < total; ++i)
    for (int64_t h = 0; h < heads; ++h) zero_row(t, operand_row(x, t, 0, i, h), d);
}

// Runner does tasks that are not streamed: FwdTaskRunner, or one with other products.
template <class Runner = FwdTaskRunner>
inline void mha_fwd(const Flash_fwd_params& p) {
  if (p.knew.ptr) append_kv(p);
  const FwdTile tile = Runner::tile(p);
  const FwdPlan plan = plan_fwd(p, tile, num_threads());
  const int threads = threads_for(plan.flops);
  const int64_t o_ld = round_up(static_cast<int>(p.d_v), kTileN);

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
  if (plan.partial_rows > 0) {
    const double merge_flops = 4.0 * plan.partial_rows * o_ld;
    parallel_for(static_cast<int64_t>(plan.tasks.size()), threads_for(merge_flops),
                 [&](int64_t i, int) {
                   const FwdTask& task = tasks[i];
                   if (task.num_splits == 1 || task.split > 0) return;
                   for (int h = 0; h < task.heads; ++h)
                     for (int r = 0; r < task.row_end - task.row_begin; ++r)
                       merge_row(p, task, h, r, partials);
                 });
  }
  if (p.cu_seqlens_q) {
    const int64_t used = p.cu_seqlens_q[p.b];
    zero_rows_beyond(p.o, p.dtype, used, p.total_q, p.h, p.d_v);
    for (int64_t h = 0; h < p.h && p.softmax_lse; ++h)
      for (int64_t i = used; i < p.total_q; ++i) p.softmax_lse[h * p.lse_head_stride + i] = -kInf;
  }
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
