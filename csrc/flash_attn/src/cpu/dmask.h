// S_dmask, a debugging output: exp(score - running row max) with the sign bit set where dropout
// drops. The running max is that of key blocks visited from the last to the first, their width a
// function of the head dim alone.
#pragma once

#include "common/dmask_block.h"
#include "cpu/fwd.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// scores [sk] of one row -> out
inline void store_dmask_row(const TaskContext<Flash_fwd_params>& ctx, const Row& row, float* s,
                            void* out) {
  const int seqlen_k = ctx.seq.seqlen_k, block = dmask_block_keys(ctx.p.d);
  RowState running;
  for (int begin = (seqlen_k - 1) / block * block; begin >= 0; begin -= block) {
    const int end = begin + block < seqlen_k ? begin + block : seqlen_k;
    for (int j = begin; j < end; ++j) running.max = s[j] > running.max ? s[j] : running.max;
    const float reference = running.anchor();
    for (int j = begin; j < end; ++j) s[j] = exp(s[j] - reference);
  }
  for (int begin = 0; begin < seqlen_k; begin += 32) {
    uint8_t random[32];
    ctx.dropout.row_bytes(ctx.map.batch_head(row), row.query, begin / 32, random);
    for (int j = begin; j < seqlen_k && j < begin + 32; ++j)
      if (random[j - begin] > ctx.dropout.keep_threshold) s[j] = -s[j];
  }
  write_row(ctx.p.o_dtype, out, s, seqlen_k);
}

// Scores [rows][seqlen_k_rounded] of a task that sees all keys.
inline void dmask_scores(FwdTaskRunner& run, const FwdTask& task, const FwdTile& tile, float* s) {
  const TaskContext<Flash_fwd_params>& ctx = run.context();
  const int64_t ld = ctx.p.seqlen_k_rounded;
  run.load_q();
  for (int64_t i = 0; i < run.rows() * ld; ++i) s[i] = -kInf;
  for (int key = 0; key < task.key_end; key += tile.keys) {
    const int keys = task.key_end - key < tile.keys ? task.key_end - key : tile.keys;
    run.pack_kv(key, keys);
    for (int r = 0; r < run.rows(); ++r) {
      const TileColumns t = ctx.map.columns(task.row_begin + r, 1, key, keys);
      if (t.begin == t.end) continue;
      run.gemm_qk(r, 1, t, s + r * ld + key, 0);
      run.finish_scores(r, s + r * ld + key, t);
    }
  }
}

inline void store_dmask(const Flash_fwd_params& p) {
  const FwdTile tile = fwd_tile(p);
  const int64_t ld = p.seqlen_k_rounded, bytes_a_row = ld * dtype_bytes(p.o_dtype);
  std::memset(p.s_dmask, 0, p.b * p.h * p.seqlen_q_rounded * bytes_a_row);
  Carver measure(nullptr);
  carve_fwd(measure, p, tile);
  Scratch scratch(measure.used() + tile.rows * ld * sizeof(float));
  Carver carver(scratch.data());
  const FwdScratch x = carve_fwd(carver, p, tile);
  float* s = carver.take<float>(tile.rows * ld);

  const auto store_rows = [&](const FwdTask& task) {
    FwdTaskRunner run(p, task, tile, x);
    dmask_scores(run, task, tile, s);
    for (int r = 0; r < run.rows(); ++r) {
      const Row& row = x.rows[r];
      const int64_t index = (task.batch * p.h + row.head) * p.seqlen_q_rounded + row.query;
      store_dmask_row(run.context(), row, s + r * ld,
                      static_cast<char*>(p.s_dmask) + index * bytes_a_row);
    }
  };
  for (int b = 0; b < p.b; ++b) {
    const Sequence seq = sequence(p, b);
    const int rows = seq.seqlen_q * static_cast<int>(p.h / p.h_k);
    for (int head_k = 0; head_k < p.h_k; ++head_k)
      for (int row = 0; row < rows; row += tile.rows)
        store_rows({.batch = b,
                    .head_k = head_k,
                    .row_begin = row,
                    .row_end = row + tile.rows < rows ? row + tile.rows : rows,
                    .key_end = seq.seqlen_k});
  }
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
