// From the product q.k to what the softmax sees, a row of a tile at a time; shared by forward and
// backward.
#pragma once

#include "common/dropout.h"
#include "common/seqlen.h"
#include "cpu/tile_fma.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr float kInf = __builtin_inff();

// Columns of a tile: [begin, end) within the tile, multiples of kTileN; key of column c is
// first_key + c.
struct TileColumns {
  int begin, end;
  int first_key;
};

// A row of a block: with grouped-query attention the rows of a key-value head are (query, group
// member), query major.
struct Row {
  int query;
  int head;
  KeyRange keys;
  float alibi_slope;
  const char* bias;  // its first element, or nullptr
};

// Row properties that do not change over the keys.
class RowMap {
 public:
  RowMap(const Attention_params& params, const Sequence& seq, int head_k)
      : p_(params),
        seq_(seq),
        mask_(mask_of(params, seq)),
        head_k_(head_k),
        group_(static_cast<int>(p_.h / p_.h_k)) {}

  int rows() const { return seq_.seqlen_q * group_; }
  int query(int row) const { return row / group_; }
  int head(int row) const { return head_k_ * group_ + row % group_; }
  KeyRange keys(int first_row, int last_row) const {
    return mask_.keys(query(first_row), query(last_row));
  }

  // Columns of the tile of keys [key, key + count) that rows [row, row + rows) see, widened to
  // kTileN.
  TileColumns columns(int row, int rows, int key, int count) const {
    const KeyRange seen = keys(row, row + rows - 1);
    int begin = seen.begin - key, end = seen.end - key;
    begin = begin < 0 ? 0 : begin > count ? count : begin;
    begin = begin / kTileN * kTileN;
    end = end > count ? count : end;
    end = end <= begin ? begin : round_up(end, kTileN);
    return {begin, end, key};
  }

  // f(first, rows, columns) for bands of the rows [row, row_end) that see the same columns: masks
  // cost nothing in whole tiles, and in others no more than kTileM rows too many.
  template <class F>
  void for_bands(int row, int row_end, int key, int count, F f) const {
    const auto group_end = [&](int r) { return row_end - r < kTileM ? row_end : r + kTileM; };
    while (row < row_end) {
      int end = group_end(row);
      const TileColumns t = columns(row, end - row, key, count);
      while (end < row_end) {
        const TileColumns next = columns(end, group_end(end) - end, key, count);
        if (next.begin != t.begin || next.end != t.end) break;
        end = group_end(end);
      }
      f(row, end - row, t);
      row = end;
    }
  }

  Row row(int r) const {
    Row x{query(r), head(r), mask_.keys(query(r)), 0.f, nullptr};
    if (p_.alibi_slopes)
      x.alibi_slope = p_.alibi_slopes[seq_.batch * p_.alibi_batch_stride + x.head];
    if (p_.bias.ptr)
      x.bias = static_cast<const char*>(p_.bias.ptr) +
               bias_offset(p_.bias, x) * dtype_bytes(p_.bias.dtype);
    return x;
  }
  // Elements from a bias' start to key 0 of a row.
  int64_t bias_offset(const Bias& bias, const Row& x) const {
    return seq_.batch * bias.batch_stride + x.head * bias.head_stride + x.query * bias.row_stride;
  }
  int64_t lse_index(int r) const {
    return seq_.batch * p_.lse_batch_stride + head(r) * p_.lse_head_stride + seq_.lse_row +
           query(r);
  }
  char* tensor_row(const Operand& x, int r) const {
    return operand_row(x, p_.dtype, seq_.batch, seq_.q_row + query(r), head(r));
  }
  uint32_t batch_head(const Row& x) const {
    return static_cast<uint32_t>(seq_.batch * p_.h + x.head);
  }
  int diagonal(const Row& x) const { return x.query + seq_.seqlen_k - seq_.seqlen_q; }

 private:
  const Attention_params& p_;
  const Sequence& seq_;
  Mask mask_;
  int head_k_, group_;
};

// The visible part of a row within a tile.
FLASH_INLINE KeyRange visible(const Row& row, const TileColumns& t) {
  int begin = row.keys.begin - t.first_key, end = row.keys.end - t.first_key;
  if (begin < t.begin) begin = t.begin;
  if (begin > t.end) begin = t.end;
  if (end > t.end) end = t.end;
  if (end < begin) end = begin;
  return {begin, end};
}

// Whether all rows from `first` to `last` see the keys [begin, end). A range of keys never moves
// back from one row to the next.
FLASH_INLINE bool all_see(const Row& first, const Row& last, int begin, int end) {
  return last.keys.begin <= begin && first.keys.end >= end;
}

// Overwrites the invisible columns of a row.
FLASH_INLINE void fill_invisible(float* s, const TileColumns& t, KeyRange seen, float value) {
  for (int j = t.begin; j < seen.begin; ++j) s[j] = value;
  for (int j = seen.end; j < t.end; ++j) s[j] = value;
}

inline void read_bias(float* dst, const ScoreParams& p, const Row& row, int first_key,
                      KeyRange seen) {
  const Bias& bias = p.bias;
  if (bias.col_stride == 1) {
    const void* src =
        row.bias + static_cast<int64_t>(first_key + seen.begin) * dtype_bytes(bias.dtype);
    read_row(bias.dtype, dst + seen.begin, src, seen.end - seen.begin, 0);
    return;
  }
  for (int j = seen.begin; j < seen.end; ++j)
    dst[j] = load_scalar(row.bias, bias.dtype, (first_key + j) * bias.col_stride);
}

// Softcap, ALiBi and bias of one row, in place; buffer holds a tile's columns. With softcap,
// cap_slope (if given) receives the softcap's derivative.
inline void modify_scores(const Attention_params& p, const RowMap& map, const Row& row, float* s,
                          const TileColumns& t, float* buffer, float* cap_slope) {
  if (p.softcap > 0.f) {
    const float inverse = 1.f / p.softcap;
    for (int j = t.begin; j < t.end; j += kWidth) {
      const Vec th = tanh(load(s + j) * inverse);
      store(s + j, th * p.softcap);
      if (cap_slope) store(cap_slope + j, 1.f - th * th);
    }
  }
  if (p.alibi_slopes) {
    const Vec slope = set1(-row.alibi_slope);
    VecI distance = iota() + (t.first_key + t.begin - map.diagonal(row));
    for (int j = t.begin; j < t.end; j += kWidth, distance += kWidth)
      store(s + j, fma(slope, abs(to_float(distance)), load(s + j)));
  }
  if (row.bias) {
    const KeyRange seen = visible(row, t);
    if (seen.begin == seen.end) return;
    read_bias(buffer, p, row, t.first_key, seen);
    for (int j = seen.begin; j < seen.end; ++j) s[j] += buffer[j];
  }
}

inline bool has_score_modifiers(const ScoreParams& p) {
  return p.softcap > 0.f || p.alibi_slopes || p.bias.ptr;
}

// One random byte for each column of a row of a tile; first_key is a multiple of 32, bytes holds
// the tile's columns.
inline void random_row_bytes(const Dropout& dropout, uint32_t batch_head, int query,
                             const TileColumns& t, uint8_t* bytes) {
  for (int j = t.begin / 32 * 32; j < t.end; j += 32)
    dropout.row_bytes(batch_head, query, (t.first_key + j) / 32, bytes + j);
}
FLASH_INLINE VecI kept(const Dropout& dropout, const uint8_t* bytes, int j) {
  return load_bytes(bytes + j) <= static_cast<int32_t>(dropout.keep_threshold);
}

FLASH_INLINE float sink_logit(const ScoreParams& p, int head) {
  return load_scalar(p.s_aux, p.s_aux_dtype, head * p.s_aux_stride);
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
