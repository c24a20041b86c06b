// What a task holds about its key-value head, whatever its products and loops: where the sequence
// lies, which rows see which keys, the head dims, and what scores go through before the softmax.
#pragma once

#include "cpu/descale.h"
#include "cpu/scores.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// Head dims, and their multiples of kTileN, for which scratch is laid out.
struct HeadDims {
  explicit HeadDims(const Operands& p)
      : d(static_cast<int>(p.d)),
        d_v(static_cast<int>(p.d_v)),
        d_pad(round_up(d, kTileN)),
        d_v_pad(round_up(d_v, kTileN)) {}

  int largest_pad() const { return d_pad > d_v_pad ? d_pad : d_v_pad; }

  const int d, d_v, d_pad, d_v_pad;
};

template <class Params>  // Flash_fwd_params, Flash_bwd_params
struct TaskContext : HeadDims {
  TaskContext(const Params& params, int batch, int head_k)
      : HeadDims(params),
        p(params),
        seq(sequence(params, batch)),
        map(params, seq, head_k),
        head_k(head_k),
        factors(params, seq, head_k),
        modifiers(has_score_modifiers(params)),
        dropout(Dropout::make(params.p_dropout, params.seed, params.offset)) {}
  TaskContext(const TaskContext&) = delete;  // map refers to seq
  TaskContext& operator=(const TaskContext&) = delete;

  // i -> row first + i of k or v; left padding does not count.
  auto key_rows(const Operand& x, int first) const {
    return [this, &x, row = int64_t{seq.leftpad} + first](int i) -> const char* {
      return cache_row(p, x, seq, row + i, head_k);
    };
  }

  // Softcap, ALiBi and bias of a row of products, in place; see modify_scores.
  void modify(const Row& row, float* s, const TileColumns& t, float scale = 1.f,
              float* cap_slope = nullptr) const {
    if (modifiers) {
      modify_scores(p, map, row, s, t, scale, cap_slope);
    } else if (scale != 1.f) {
      for (int j = t.begin; j < t.end; j += kWidth) store(s + j, load(s + j) * scale);
    }
  }

  // The same, and -inf where the row sees nothing. True if it sees every column.
  bool finish_scores(const Row& row, float* s, const TileColumns& t, float scale = 1.f) const {
    modify(row, s, t, scale);
    const KeyRange seen = visible(row, t);
    if (seen.begin == t.begin && seen.end == t.end) return true;
    fill_invisible(s, t, seen, -kInf);
    return false;
  }

  // Dropout's byte for each column of a row; first_key is a multiple of 32.
  void random_bytes(const Row& row, const TileColumns& t, uint8_t* bytes) const {
    random_row_bytes(dropout, map.batch_head(row), row.query, t, bytes);
  }
  // The same for successive rows, cheaper than one by one.
  void random_bytes(const Row* rows, int count, const TileColumns& t, uint8_t* bytes,
                    int64_t ld) const {
    random_rows_bytes(dropout, map, rows, count, t, bytes, ld);
  }
  // Row r of them. Later rows may share its numbers: start with the first.
  void random_bytes_of(int r, const Row* rows, int count, const TileColumns& t, uint8_t* bytes,
                       int64_t ld) const {
    random_row_bytes_of(dropout, map, r, rows, count, t, bytes, ld);
  }

  const Params& p;
  const Sequence seq;
  const RowMap map;
  const int head_k;
  const HeadFactors factors;
  const bool modifiers;
  const DropoutLanes dropout;
};

// Rows of a packed batch that belong to no sequence.
inline void zero_rows_beyond(const Operand& x, Dtype t, int64_t first, int64_t total, int64_t heads,
                             int64_t d) {
  for (int64_t i = first; i < total; ++i)
    for (int64_t h = 0; h < heads; ++h) zero_row(t, operand_row(x, t, 0, i, h), d);
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
