// From the product q.k to what the softmax sees, a row of a tile at a time; shared by forward and
// backward.
#pragma once

#include "base/cpu/philox.h"
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
        group_(static_cast<int>(p_.h / p_.h_k)),
        shift_((group_ & (group_ - 1)) == 0 ? __builtin_ctz(group_) : -1) {}

  int rows() const { return seq_.seqlen_q * group_; }
  int group() const { return group_; }
  int seqlen_k() const { return seq_.seqlen_k; }
  int query(int row) const { return shift_ >= 0 ? row >> shift_ : row / group_; }
  int head(int row) const {
    return head_k_ * group_ + (shift_ >= 0 ? row & (group_ - 1) : row % group_);
  }
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
  // Of q and what has its dtype.
  char* tensor_row(const Operand& x, int r) const {
    return operand_row(x, p_.dtype, seq_.batch, seq_.q_row + query(r), head(r));
  }
  char* out_row(int r) const {
    return operand_row(p_.o, p_.o_dtype, seq_.batch, seq_.q_row + query(r), head(r));
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
  int shift_;  // group_ is 2^shift_; -1: it is not a power of two
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
  const Vec fill = set1(value);
  int j = t.begin;
  for (; j + kWidth <= seen.begin; j += kWidth) store(s + j, fill);
  if (j < seen.begin) store(s + j, select(iota() < seen.begin - j, fill, load(s + j)));
  j = seen.end / kWidth * kWidth;
  if (j < seen.end) {
    store(s + j, select(iota() < seen.end - j, load(s + j), fill));
    j += kWidth;
  }
  for (; j < t.end; j += kWidth) store(s + j, fill);
}

// What modify_scores does to a row besides bias.
struct RowModifiers {
  float scale;  // from products to scores; with softcap, to what tanh_of_half takes
  float softcap;
  float slope = 0.f;     // ALiBi's, negative
  float distance = 0.f;  // of column 0 from the diagonal
  float* cap_slope = nullptr;
};

// Modifies columns [begin, end) of a row; bias(j) is added to those from j on.
template <bool kSoftcap, bool kAlibi, class BiasAt>
FLASH_INLINE void modify_columns(const RowModifiers& x, float* s, int begin, int end, BiasAt bias) {
  const Vec scale = set1(x.scale), softcap = set1(x.softcap), slope = set1(x.slope);
  Vec distance = to_float(iota()) + (x.distance + static_cast<float>(begin));
  float* const cap_slope = x.cap_slope;
  for (int j = begin; j < end; j += kWidth) {
    Vec v = load(s + j) * scale;
    if constexpr (kSoftcap) {
      const TanhAndSlope th = tanh_of_half(v);
      v = th.value * softcap;
      if (cap_slope) store(cap_slope + j, th.slope);
    }
    if constexpr (kAlibi) {
      v = fma(slope, abs(distance), v);
      distance += static_cast<float>(kWidth);
    }
    store(s + j, v + bias(j));
  }
}

// The same with the bias of a row.
template <bool kSoftcap, bool kAlibi>
inline void modify_row(const Bias& b, const RowMap& map, const Row& row, const RowModifiers& x,
                       float* s, const TileColumns& t) {
  if (!row.bias || b.col_stride != 1) {
    const bool constant = row.bias && b.col_stride == 0;
    const Vec value = set1(constant ? load_scalar(row.bias, b.dtype, 0) : 0.f);
    modify_columns<kSoftcap, kAlibi>(x, s, t.begin, t.end, [=](int) { return value; });
    if (!row.bias || constant) return;
    const KeyRange seen = visible(row, t);
    for (int j = seen.begin; j < seen.end; ++j)
      s[j] += load_scalar(row.bias, b.dtype, (t.first_key + j) * b.col_stride);
    return;
  }
  // Elements of invisible keys are read as well, but none beyond the row's last.
  const int left = map.seqlen_k() - t.first_key, keys = left < t.end ? left : t.end;
  const int whole = keys / kWidth * kWidth;
  with_dtype(b.dtype, [&]<Dtype T>() __attribute__((always_inline)) {
    const char* first = row.bias + int64_t{t.first_key} * dtype_bytes(T);
    modify_columns<kSoftcap, kAlibi>(x, s, t.begin, whole,
                                     [=](int j) { return load_as_float<T>(first, j); });
  });
  if (whole == t.end) return;
  alignas(64) float rest[kTileN];  // columns end less than kTileN after the last key
  read_row(b.dtype, rest, row.bias + int64_t{t.first_key + whole} * dtype_bytes(b.dtype),
           keys - whole, t.end - whole);
  modify_columns<kSoftcap, kAlibi>(x, s, whole, t.end,
                                   [&](int j) { return load(rest + j - whole); });
}

// Softcap, ALiBi and bias of one row of products, in place, invisible columns among them; `scale`
// makes scores of products. With softcap, cap_slope (if given) receives the softcap's derivative.
inline void modify_scores(const Attention_params& p, const RowMap& map, const Row& row, float* s,
                          const TileColumns& t, float scale, float* cap_slope) {
  const RowModifiers x{.scale = p.softcap > 0.f ? 2.f * scale / p.softcap : scale,
                       .softcap = p.softcap,
                       .slope = -row.alibi_slope,
                       .distance = static_cast<float>(t.first_key - map.diagonal(row)),
                       .cap_slope = cap_slope};
  if (p.softcap > 0.f)
    p.alibi_slopes ? modify_row<true, true>(p.bias, map, row, x, s, t)
                   : modify_row<true, false>(p.bias, map, row, x, s, t);
  else
    p.alibi_slopes ? modify_row<false, true>(p.bias, map, row, x, s, t)
                   : modify_row<false, false>(p.bias, map, row, x, s, t);
}

// The same for `count` rows of kColumns, `ld` apart, that have all these keys: what does not depend
// on a row is done once.
template <int kColumns>
inline void modify_rows(const Attention_params& p, const RowMap& map, const Row* rows, int count,
                        float* s, int64_t ld, int first_key, float scale) {
  const Bias& b = p.bias;
  if (first_key + kColumns > map.seqlen_k() || (b.ptr && b.col_stride != 1)) {
    for (int r = 0; r < count; ++r)
      modify_scores(p, map, rows[r], s + r * ld, {0, kColumns, first_key}, scale, nullptr);
    return;
  }
  const auto run = [&]<bool kSoftcap, bool kAlibi>(auto bias_of) __attribute__((always_inline)) {
    RowModifiers x{.scale = kSoftcap ? 2.f * scale / p.softcap : scale, .softcap = p.softcap};
    for (int r = 0; r < count; ++r) {
      x.slope = -rows[r].alibi_slope;
      x.distance = static_cast<float>(first_key - map.diagonal(rows[r]));
      modify_columns<kSoftcap, kAlibi>(x, s + r * ld, 0, kColumns, bias_of(rows[r]));
    }
  };
  const auto with_bias = [&](auto bias_of) __attribute__((always_inline)) {
    if (p.softcap > 0.f)
      p.alibi_slopes ? run.template operator()<true, true>(bias_of)
                     : run.template operator()<true, false>(bias_of);
    else
      p.alibi_slopes ? run.template operator()<false, true>(bias_of)
                     : run.template operator()<false, false>(bias_of);
  };
  if (!b.ptr) return with_bias([](const Row&) { return [](int) { return zero(); }; });
  with_dtype(b.dtype, [&]<Dtype T>() __attribute__((always_inline)) {
    with_bias([=](const Row& row) {
      const char* first = row.bias + int64_t{first_key} * dtype_bytes(T);
      return [=](int j) { return load_as_float<T>(first, j); };
    });
  });
}

inline bool has_score_modifiers(const ScoreParams& p) {
  return p.softcap > 0.f || p.alibi_slopes || p.bias.ptr;
}

// Dropout's random numbers, several counters at a time.
struct DropoutLanes : Dropout {
  explicit DropoutLanes(const Dropout& dropout)
      : Dropout(dropout), keys(seed ^ (offset >> 32 << 32)) {}

  PhiloxLanes random_lanes(uint32_t batch_head, int query, int first_key) const {
    const auto row = static_cast<uint32_t>(query);
    return philox_lanes(keys, static_cast<uint32_t>(first_key / 8), row / 16 * 8 + row % 8,
                        batch_head, static_cast<uint32_t>(offset));
  }

  PhiloxKeys keys;
};

// The 16 bits of each counter's four words that are of a query with query / 8 % 2 = kHalf.
template <int kHalf>
FLASH_INLINE VecU16x2 bytes_of_half(const PhiloxLanes& r) {
  constexpr uint64_t kLow = 0xffff, kHigh = 0xffff0000;
  const VecU64 x =
      kHalf == 0 ? (r.x[0] & kLow) | (r.x[1] & kLow) << 16 | (r.x[2] & kLow) << 32 | r.x[3] << 48
                 : (r.x[0] >> 16 & kLow) | (r.x[1] & kHigh) | (r.x[2] & kHigh) << 16 |
                       (r.x[3] & kHigh) << 32;
  return reinterpret_cast<VecU16x2>(x);
}
// Four counters' bytes in the order of their 32 keys.
template <int... kLane>
FLASH_INLINE VecU16x2 in_key_order(VecU16x2 x, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(x, x, (kLane / 16 * 16 + kLane % 4 * 4 + kLane % 16 / 4)...);
}

// One random byte for each column of a query's row of a tile, and of the row 8 queries after it if
// that is given; first_key is a multiple of 32. Rows of bytes hold the tile's columns and 32 more.
inline void random_row_bytes(const DropoutLanes& dropout, uint32_t batch_head, int query,
                             const TileColumns& t, uint8_t* bytes, uint8_t* partner = nullptr) {
  constexpr int kKeys = 8 * kCounters;
  for (int j = t.begin / 32 * 32; j < t.end; j += kKeys < 32 ? 32 : kKeys) {
    if constexpr (kKeys < 32) {
      dropout.row_bytes(batch_head, query, (t.first_key + j) / 32, bytes + j);
      if (partner) dropout.row_bytes(batch_head, query + 8, (t.first_key + j) / 32, partner + j);
    } else {
      const PhiloxLanes r = dropout.random_lanes(batch_head, query, t.first_key + j);
      const auto write = [j](uint8_t* to, VecU16x2 x) __attribute__((always_inline)) {
        store_u16x2(reinterpret_cast<uint16_t*>(to + j),
                    in_key_order(x, std::make_integer_sequence<int, 2 * kWidth>{}));
      };
      write(bytes, query / 8 % 2 == 0 ? bytes_of_half<0>(r) : bytes_of_half<1>(r));
      if (partner) write(partner, bytes_of_half<1>(r));
    }
  }
}

// The same for row r of `count` successive rows, and for the one 8 queries after it where both
// share their random numbers: the first one's query % 16 < 8. Nothing is left to do for such a row.
inline void random_row_bytes_of(const DropoutLanes& dropout, const RowMap& map, int r,
                                const Row* rows, int count, const TileColumns& t, uint8_t* bytes,
                                int64_t ld) {
  const int apart = 8 * map.group();
  const Row& row = rows[r];
  const bool first = row.query % 16 < 8;
  if (!first && r >= apart) return;
  uint8_t* const partner = first && r + apart < count ? bytes + (r + apart) * ld : nullptr;
  random_row_bytes(dropout, map.batch_head(row), row.query, t, bytes + r * ld, partner);
}
// For all of them.
inline void random_rows_bytes(const DropoutLanes& dropout, const RowMap& map, const Row* rows,
                              int count, const TileColumns& t, uint8_t* bytes, int64_t ld) {
  for (int r = 0; r < count; ++r) random_row_bytes_of(dropout, map, r, rows, count, t, bytes, ld);
}

// Which of kWidth scores dropout keeps: for select.
#if defined(FLASH_ATTN_SIMD_AVX512)
struct KeptLanes {
  __mmask16 mask;
};
FLASH_INLINE Vec select(KeptLanes kept, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(kept.mask, no, yes);
}
FLASH_INLINE KeptLanes kept(const Dropout& dropout, const uint8_t* bytes, int j) {
  return {_mm_cmple_epu8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + j)),
                              _mm_set1_epi8(static_cast<char>(dropout.keep_threshold)))};
}
#else
FLASH_INLINE VecI kept(const Dropout& dropout, const uint8_t* bytes, int j) {
  return load_bytes(bytes + j) <= static_cast<int32_t>(dropout.keep_threshold);
}
#endif

// All bits of those of 2 kWidth 16-bit numbers that dropout keeps.
FLASH_INLINE VecU16x2 kept_u16(const Dropout& dropout, const uint8_t* bytes) {
  typedef uint8_t Bytes __attribute__((vector_size(2 * kWidth)));
  typedef int16_t Masks __attribute__((vector_size(4 * kWidth)));
  Bytes b;
  std::memcpy(&b, bytes, sizeof(b));
  const auto keep = b <= static_cast<uint8_t>(dropout.keep_threshold);
  return reinterpret_cast<VecU16x2>(__builtin_convertvector(keep, Masks));
}

FLASH_INLINE float sink_logit(const ScoreParams& p, int head) {
  return load_scalar(p.s_aux, p.s_aux_dtype, head * p.s_aux_stride);
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
