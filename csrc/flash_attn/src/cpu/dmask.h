// S_dmask, a debugging output: exp(score - running row max) with the sign bit set where dropout
// drops. The running max is that of key blocks visited from the last to the first, their width a
// function of the head dim alone.
#pragma once

#include "cpu/fwd.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// Key block width of the reference package with dropout (flash_attn_interface._get_block_size_n).
inline int dmask_block_keys(int64_t d) {
  if (d <= 32) return 128;
  if (d <= 96) return 64;
  return d <= 128 ? 32 : 64;
}

// scores [sk] of one row -> out
inline void store_dmask_row(const Flash_fwd_params& p, const FwdTaskRunner& run, const Row& row,
                            float* s, int seqlen_k, uint8_t* random, void* out) {
  const int block = dmask_block_keys(p.d);
  float running = -kInf;
  for (int begin = (seqlen_k - 1) / block * block; begin >= 0; begin -= block) {
    const int end = begin + block < seqlen_k ? begin + block : seqlen_k;
    for (int j = begin; j < end; ++j) running = s[j] > running ? s[j] : running;
    const float reference = running == -kInf ? 0.f : running;
    for (int j = begin; j < end; ++j) s[j] = exp(s[j] - reference);
  }
  for (int begin = 0; begin < seqlen_k; begin += 32) {
    run.dropout().row_bytes(run.map().batch_head(row), row.query, begin / 32, random);
    for (int j = begin; j < seqlen_k && j < begin + 32; ++j)
      if (random[j - begin] > run.dropout().keep_threshold) s[j] = -s[j];
  }
  write_row(p.dtype, out, s, seqlen_k);
}

inline void store_dmask(const Flash_fwd_params& p) {
  const FwdTile tile = fwd_tile(p);
  const int64_t bytes_a_row = p.seqlen_k_rounded * dtype_bytes(p.dtype);
  std::memset(p.s_dmask, 0, p.b * p.h * p.seqlen_q_rounded * bytes_a_row);
  Carver measure(nullptr);
  carve_fwd(measure, p, tile);
  Scratch scratch(measure.used() + tile.rows * p.seqlen_k_rounded * sizeof(float));
  Carver carver(scratch.data());
  const FwdScratch x = carve_fwd(carver, p, tile);
  float* s = carver.take<float>(tile.rows * p.seqlen_k_rounded);

  const auto store_rows = [&](const FwdTask& task, int seqlen_k) {
    FwdTaskRunner run(p, task, tile, x);
    run.load_q();
    for (int64_t i = 0; i < run.rows() * p.seqlen_k_rounded; ++i) s[i] = -kInf;
    for (int key = 0; key < seqlen_k; key += tile.keys) {
      const int keys = seqlen_k - key < tile.keys ? seqlen_k - key : tile.keys;
      run.pack_kv(key, keys);
      for (int r = 0; r < run.rows(); ++r) {
        const TileColumns t = run.map().columns(task.row_begin + r, 1, key, keys);
        float* row = s + r * p.seqlen_k_rounded + key;
        if (t.begin < t.end) run.gemm_qk(r, 1, t, row, 0);
        if (t.begin < t.end) run.finish_scores(r, row, t);
      }
    }
    for (int r = 0; r < run.rows(); ++r) {
      const Row& row = x.rows[r];
      const int64_t index = (task.batch * p.h + row.head) * p.seqlen_q_rounded + row.query;
      store_dmask_row(p, run, row, s + r * p.seqlen_k_rounded, seqlen_k, x.random,
                      static_cast<char*>(p.s_dmask) + index * bytes_a_row);
    }
  };
  for (int b = 0; b < p.b; ++b) {
    const Sequence seq = sequence(p, b);
    const int rows = seq.seqlen_q * static_cast<int>(p.h / p.h_k);
    for (int head_k = 0; head_k < p.h_k; ++head_k)
      for (int row = 0; row < rows; row += tile.rows) {
        const int row_end = row + tile.rows < rows ? row + tile.rows : rows;
        store_rows({b, head_k, row, row_end, 0, seq.seqlen_k, 0, 1, 0}, seq.seqlen_k);
      }
  }
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
