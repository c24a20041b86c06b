// Forward attention, FlashAttention-2 (arXiv:2307.08691) algorithm 1, in fp32 FMAs (tile_fma.h).
//
// A task owns up to task_rows rows (queries x GQA group) of one key-value head and walks over key
// blocks:
//
//   pack K^T and V          to fp32 panels, once a task and block: 2 d bytes_in + 8 d bytes written
//                           a key
//   for each tile of rows:
//     S = Q K^T             gemm_qk: 2 rows keys d flops, Q in L2, a K panel in L1
//     mask, softmax         softmax_step: on the visible columns only, S stays in L1/L2
//     O = a O + P V         gemm_pv: 2 rows keys dv flops, a = 2^(old max - new max) folded into
//                           the first use of O
//
// softmax_scale enters with Q: its rows are multiplied by it as they are read, and S holds scores.
// (fwd_tiles.h packs Q as it is: a scaled bf16 number is not one.)
//
// Groups of kTileM rows know which columns any of them sees; products and softmax touch nothing
// else, so causal and windowed work is proportional to the visible scores. A row's arithmetic
// depends on its own position only: neither on the task it falls into nor on the number of threads.
#pragma once

#include "cpu/decode.h"
#include "cpu/task_context.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr int kFwdTileRows = 4 * kTileM;

inline FwdTile fwd_tile(const Flash_fwd_params& p) {
  const HeadDims dims(p);
  const int bytes_a_row = 4 * (dims.d_pad + dims.d_v_pad);
  int keys = (192 << 10) / bytes_a_row / 32 * 32;
  keys = keys < 32 ? 32 : keys > 256 ? 256 : keys;
  int task_rows = (512 << 10) / bytes_a_row / kFwdTileRows * kFwdTileRows;
  task_rows = task_rows < kFwdTileRows ? kFwdTileRows : task_rows;
  return {.rows = kFwdTileRows, .keys = keys, .task_rows = task_rows, .stream = stream_tile(p)};
}

struct FwdScratch {
  float *q, *o;      // [task_rows][d], [task_rows][dv], padded to kTileN
  float *k, *v;      // packed key block
  float* s;          // [tile.rows][tile.keys]
  float* buffer;     // a packing panel
  float* row_scale;  // [tile.rows]
  RowState* state;   // [task_rows]
  Row* rows;         // [task_rows]
  uint8_t* random;   // [tile.rows][random_ld(tile)], with dropout
};

inline int64_t random_ld(const FwdTile& tile) { return tile.keys + 32; }

inline FwdScratch carve_fwd(Carver& c, const Flash_fwd_params& p, const FwdTile& tile) {
  const HeadDims dims(p);
  const int64_t d = dims.d_pad, dv = dims.d_v_pad;
  FwdScratch x;
  x.q = c.take<float>(tile.task_rows * d);
  x.o = c.take<float>(tile.task_rows * dv);
  x.k = c.take<float>(tile.keys * d);
  x.v = c.take<float>(tile.keys * dv);
  x.s = c.take<float>(static_cast<int64_t>(tile.rows) * tile.keys);
  x.buffer = c.take<float>(dims.largest_pad() * kTileN);
  x.row_scale = c.take<float>(tile.rows);
  x.state = c.take<RowState>(tile.task_rows);
  x.rows = c.take<Row>(tile.task_rows);
  x.random = c.take<uint8_t>(p.p_dropout > 0.f ? tile.rows * random_ld(tile) : 0);
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
      : ctx_(p, task.batch, task.head_k), task_(task), tile_(tile), x_(x) {}

  void run() {
    load_q();
    std::memset(x_.o, 0, sizeof(float) * rows() * ctx_.d_v_pad);
    if (task_.key_begin >= task_.key_end) return;
    for (int key = task_.key_begin / tile_.keys * tile_.keys; key < task_.key_end;
         key += tile_.keys) {
      const int keys = task_.key_end - key < tile_.keys ? task_.key_end - key : tile_.keys;
      pack_kv(key, keys);
      for (int row = 0; row < rows(); row += tile_.rows) attend(row, key, keys);
    }
  }

  // The steps, of which S_dmask takes some (dmask.h).
  const TaskContext<Flash_fwd_params>& context() const { return ctx_; }
  int rows() const { return task_.row_end - task_.row_begin; }

  // fp32 queries, rotated and scaled, and fresh softmax states.
  void load_q() {
    for (int r = 0; r < rows(); ++r) {
      const int row = task_.row_begin + r;
      x_.rows[r] = ctx_.map.row(row);
      x_.state[r] = RowState{};
      read_scaled_query(ctx_.p, ctx_.seq, ctx_.map, row, ctx_.factors.q, 1.f,
                        x_.q + int64_t{r} * ctx_.d_pad, ctx_.d_pad);
    }
  }

  void pack_kv(int key, int keys) {
    const int padded = round_up(keys, kTileN);
    const auto k_rows = ctx_.key_rows(ctx_.p.k, key), v_rows = ctx_.key_rows(ctx_.p.v, key);
    const auto k_factors = [&](int i) { return ctx_.factors.of_k(key + i); };
    const auto v_factors = [&](int i) { return ctx_.factors.of_v(key + i); };
    pack_transposed(x_.k, ctx_.p.kv_dtype, keys, ctx_.d, k_rows, x_.buffer, k_factors);
    v_finite_ =
        pack_natural(x_.v, ctx_.p.kv_dtype, keys, padded, ctx_.d_v, v_rows, x_.buffer, v_factors);
    v_rows_ = padded;
  }

  void gemm_qk(int row, int count, const TileColumns& t, float* s, int64_t s_ld) const {
    Product x{};
    x.k = ctx_.d;
    x.a = x_.q + int64_t{row} * ctx_.d_pad;
    x.a_ld = ctx_.d_pad;
    x.c = s + t.begin;
    x.c_ld = s_ld;
    const OperandB k = transposed_operand(x_.k + int64_t{t.begin} * ctx_.d_pad, ctx_.d);
    multiply_in_pieces(count, t.end - t.begin, x, k);
  }

  // Softcap, ALiBi, bias and mask of one row. True if it sees every column.
  bool finish_scores(int r, float* s, const TileColumns& t) const {
    return ctx_.finish_scores(x_.rows[r], s, t);
  }

 private:
  // One tile of rows over the packed key block; rows count from the task's first.
  void attend(int row, int key, int keys) {
    const int end = rows() - row < tile_.rows ? rows() : row + tile_.rows;
    ctx_.map.for_bands(task_.row_begin + row, task_.row_begin + end, key, keys,
                       [&](int first, int count, const TileColumns& t) {
                         if (t.begin < t.end) attend_band(first - task_.row_begin, count, t);
                       });
  }

  void attend_band(int row, int count, const TileColumns& t) {
    gemm_qk(row, count, t, x_.s, tile_.keys);
    if (ctx_.dropout.enabled)
      ctx_.random_bytes(x_.rows + row, count, t, x_.random, random_ld(tile_));
    bool all_visible = true;
    for (int r = 0; r < count; r += kTileM)
      all_visible &= softmax_step(row, r, count - r < kTileM ? count - r : kTileM, t);
    gemm_pv(row, count, t, x_.s, x_.row_scale, !v_finite_ && !all_visible);
  }

  // S -> P of rows [first, first + count) of the band that begins at `row`; updates their states
  // and the factors that their O must be scaled by. True if they see every column.
  bool softmax_step(int row, int first, int count, const TileColumns& t) {
    const auto s = [&](int r) { return x_.s + int64_t{first + r} * tile_.keys; };
    RowState* const states = x_.state + row + first;
    bool all_visible = true;
    for (int r = 0; r < count; ++r) all_visible &= finish_scores(row + first + r, s(r), t);
    for (int r = 0; r < count; ++r)
      x_.row_scale[first + r] = raise_maximum(s(r), t.begin, t.end, states[r]);
    for (int r = 0; r < count; ++r) weigh_scores(s(r), t.begin, t.end, states[r]);
    if (ctx_.dropout.enabled)
      for (int r = 0; r < count; ++r) drop(x_.random + (first + r) * random_ld(tile_), s(r), t);
    return all_visible;
  }

  void drop(const uint8_t* random, float* p, const TileColumns& t) const {
    for (int j = t.begin; j < t.end; j += kWidth)
      store(p + j, select(kept(ctx_.dropout, random, j), load(p + j), zero()));
  }

  void gemm_pv(int row, int count, const TileColumns& t, const float* p, const float* scale,
               bool skip_zeros) const {
    OperandB v = natural_operand(x_.v, v_rows_);
    v.data += t.begin * kTileN;
    Product x{};
    x.k = t.end - t.begin;
    x.a = p + t.begin;
    x.a_ld = tile_.keys;
    x.c = x_.o + int64_t{row} * ctx_.d_v_pad;
    x.c_ld = ctx_.d_v_pad;
    x.init = Init::kScaleRows;
    x.row_scale = scale;
    multiply<false>(count, ctx_.d_v_pad, x, v, skip_zeros);
  }

  const TaskContext<Flash_fwd_params> ctx_;
  const FwdTask& task_;
  const FwdTile& tile_;
  const FwdScratch& x_;
  bool v_finite_ = true;
  int v_rows_ = 0;
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
