// Attention of few rows over many keys ("decode"): K and V are read once, straight from the (paged)
// cache, and never packed.
//
// A task owns all rows (queries x GQA group) of neighbouring key-value heads and a part of the keys
// (plan.h). It walks over blocks of keys, and over its heads within a block: in a cache of layout
// [key, head, dim] it thus reads long runs of memory. For each block and head
//
//   S = Q K^T, mask, softmax, O = a O + P V      as in fwd.h, on tile_stream.h's products
//
// while the rows of the next block and head are prefetched; fp8 is expanded to fp16 first. The
// bound is memory: a key costs bytes(d + dv) to read and rows (d + dv) FMAs. Split keys:
// FlashDecoding (the "KV split" of https://pytorch.org/blog/flash-decoding), merged by merge_row in
// the order of the keys.
#pragma once

#include "base/cpu/scratch.h"
#include "cpu/plan.h"
#include "cpu/row_state.h"
#include "cpu/task_context.h"
#include "cpu/tile_stream.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr int kStreamRows = 16;      // of a head, at most
inline constexpr int kStreamTaskRows = 64;  // of a task's heads, at most
inline constexpr int kStreamBlockBytes = kWidth == 16 ? 16 << 10 : 24 << 10;  // of K, and of V
inline constexpr int kStreamBlockKeys = 160;                                  // at most
inline constexpr int kStreamRunBytes = 4 << 10;  // of neighbouring heads of one key: a page
inline constexpr int kValueKeys = 16;  // whose rows of V are read a strip at a time from L1
inline constexpr int kExpandedKeys = kTileKeys > kValueKeys ? kTileKeys : kValueKeys;

// What products read: fp8 is expanded, a few keys of a head at a time.
constexpr Dtype read_as(Dtype t) { return t == Dtype::kFloat8E4M3 ? Dtype::kFloat16 : t; }

// Keys of a block: tiles of keys, and columns of a score tile.
inline int stream_block_keys(const Flash_fwd_params& p) {
  constexpr int kStep = kTileKeys % kTileN == 0 ? kTileKeys : 2 * kTileKeys;
  static_assert(kStep % kTileN == 0 && kStreamBlockKeys % kStep == 0);
  const int64_t row_bytes = (p.d > p.d_v ? p.d : p.d_v) * dtype_bytes(read_as(p.kv_dtype));
  const int keys = static_cast<int>(kStreamBlockBytes / row_bytes / kStep * kStep);
  return keys < kStep ? kStep : keys > kStreamBlockKeys ? kStreamBlockKeys : keys;
}

inline StreamTile stream_tile(const Flash_fwd_params& p) {
  if (p.p_dropout > 0.f) return {};  // random bytes come for aligned columns
  const auto heads_adjoin = [](const Operand& x) {
    return x.head_stride > 0 && x.head_stride < x.row_stride;
  };
  const int64_t row_bytes = (p.d > p.d_v ? p.d : p.d_v) * dtype_bytes(p.kv_dtype);
  int64_t heads = heads_adjoin(p.k) && heads_adjoin(p.v) ? kStreamRunBytes / row_bytes : 1;
  heads = heads < 1 ? 1 : heads < p.h_k ? heads : p.h_k;
  return {kStreamRows, kStreamTaskRows, static_cast<int>(heads)};
}

struct StreamScratch {
  float *q, *o;       // [kStreamTaskRows][d], [..][dv], padded to kTileN, in part order
  float* s;           // [kStreamRows][block keys]
  float* buffer;      // a row of V
  RowState* state;    // [kStreamTaskRows]
  Row* rows;          // [kStreamTaskRows]
  const char** k[2];  // rows of a block, of the task's first head; this block's and the next's
  const char** v[2];
  uint16_t* expanded;          // [kExpandedKeys][expanded_ld]: K or V in fp8 as fp16
  const char** expanded_rows;  // its rows
};

inline int64_t expanded_ld(const HeadDims& dims) { return dims.largest_pad(); }

inline StreamScratch carve_stream(Carver& c, const Flash_fwd_params& p) {
  const int keys = stream_block_keys(p);
  const HeadDims dims(p);
  StreamScratch x;
  x.q = c.take<float>(int64_t{kStreamTaskRows} * dims.d_pad);
  x.o = c.take<float>(int64_t{kStreamTaskRows} * dims.d_v_pad);
  x.s = c.take<float>(int64_t{kStreamRows} * keys);
  x.buffer = c.take<float>(dims.d_v_pad);
  x.state = c.take<RowState>(kStreamTaskRows);
  x.rows = c.take<Row>(kStreamTaskRows);
  for (int i = 0; i < 2; ++i) {
    x.k[i] = c.take<const char*>(keys);
    x.v[i] = c.take<const char*>(keys);
  }
  const int expanded = p.kv_dtype == Dtype::kFloat8E4M3 ? kExpandedKeys : 0;
  x.expanded = c.take<uint16_t>(expanded * expanded_ld(dims));
  x.expanded_rows = c.take<const char*>(expanded);
  return x;
}

// Calls f with the number of rows, at most M, as a compile-time constant.
template <int M, class F>
FLASH_INLINE void with_rows(int rows, F f) {
  if (rows >= M) return f.template operator()<M>();
  if constexpr (M > 1) with_rows<M - 1>(rows, f);
}

template <Dtype T>
class StreamTaskRunner {
 public:
  StreamTaskRunner(const Flash_fwd_params& p, const FwdTask& task, const StreamScratch& x)
      : p_(p),
        task_(task),
        x_(x),
        seq_(sequence(p, task.batch)),
        dims_(p),
        block_keys_(stream_block_keys(p)),
        modifiers_(has_score_modifiers(p)) {}

  void run() {
    for (int h = 0; h < task_.heads; ++h) load_q(h);
    std::memset(x_.o, 0, sizeof(float) * task_.heads * rows() * dims_.d_v_pad);
    for (int i = 0; kIsExpanded && i < kExpandedKeys; ++i)
      x_.expanded_rows[i] = reinterpret_cast<const char*>(x_.expanded + i * expanded_ld(dims_));
    int keys = find_rows(0, task_.key_begin);
    prefetch(k_rows(0, 0), keys, dims_.d * dtype_bytes(T));
    prefetch(v_rows(0, 0), keys, dims_.d_v * dtype_bytes(T));
    for (int key = task_.key_begin; key < task_.key_end; key += block_keys_, ++block_) {
      const int next_keys = find_rows((block_ + 1) % 2, key + keys);
      for (int h = 0; h < task_.heads; ++h) attend(h, key, keys, next_keys);
      keys = next_keys;
    }
    for (int h = 0; h < task_.heads; ++h) store_o(h);
  }

  const Sequence& seq() const { return seq_; }
  int rows() const { return task_.row_end - task_.row_begin; }  // of a head

 private:
  static constexpr Dtype kRead = read_as(T);
  static constexpr bool kIsExpanded = kRead != T;
  static constexpr float kScale = kIsExpanded ? kFp8OfFp16 : 1.f;  // of what is read

  void load_q(int h) {
    const RowMap map(p_, seq_, task_.head_k + h);
    const HeadFactors factors(p_, seq_, task_.head_k + h);
    for (int i = 0; i < rows(); ++i) {
      const int row = task_.row_begin + i, r = h * rows() + i;
      x_.rows[r] = map.row(row);
      x_.state[r] = RowState{};
      float* q = x_.q + int64_t{r} * dims_.d_pad;
      read_scaled_query(p_, seq_, map, row, factors.q, factors.k.shared() * kScale, q, dims_.d_pad);
      to_part_order<kRead>(q, dims_.d_pad);
    }
  }

  // The sums of a head, from part order, with V's factors.
  void store_o(int h) {
    const float factor = HeadFactors(p_, seq_, task_.head_k + h).v.shared() * kScale;
    for (int r = h * rows(); r < (h + 1) * rows(); ++r) {
      float* o = x_.o + int64_t{r} * dims_.d_v_pad;
      from_part_order<kRead>(o, dims_.d_v_pad);
      multiply_output(o, factor, x_.state[r].sum, dims_.d_v_pad);
    }
  }

  // Where the rows of the block at `key` lie; returns their number. Missing ones repeat the last.
  int find_rows(int slot, int key) {
    const int left = task_.key_end - key;
    const int keys = left < 0 ? 0 : left < block_keys_ ? left : block_keys_;
    const int64_t first = seq_.leftpad + key;
    for (int i = 0; i < keys; ++i) {
      x_.k[slot][i] = cache_row(p_, p_.k, seq_, first + i, task_.head_k);
      x_.v[slot][i] = cache_row(p_, p_.v, seq_, first + i, task_.head_k);
    }
    for (int i = keys; i > 0 && i < block_keys_; ++i) {
      x_.k[slot][i] = x_.k[slot][i - 1];
      x_.v[slot][i] = x_.v[slot][i - 1];
    }
    return keys;
  }

  StreamRows k_rows(int slot, int h) const {
    return {x_.k[slot], h * p_.k.head_stride * dtype_bytes(T)};
  }
  StreamRows v_rows(int slot, int h) const {
    return {x_.v[slot], h * p_.v.head_stride * dtype_bytes(T)};
  }

  void prefetch(StreamRows rows, int count, int bytes) const {
    for (int n = 0; n < count; ++n)
      for (int i = 0; i < bytes; i += kLine) __builtin_prefetch(rows.row(n) + i);
  }

  // What products read of `count` rows. Rows that are expanded here prefetch those ahead; of others
  // the products do.
  StreamRows readable(StreamRows rows, StreamRows ahead, int count, int d) const {
    if constexpr (!kIsExpanded) return rows;
    for (int n = 0; n < count; ++n) {
      for (int i = 0; i < d; i += kLine) __builtin_prefetch(ahead.row(n) + i);
      expand_row(x_.expanded + n * expanded_ld(dims_), rows.row(n), d);
    }
    return {x_.expanded_rows, 0};
  }

  // One head over one block of keys. Meanwhile the rows that come next are prefetched: the next
  // head's, or the next block's of the first head; at the end, for want of others, these again.
  void attend(int h, int key, int keys, int next_keys) {
    const int slot = block_ % 2;
    const bool last = h + 1 == task_.heads;
    const int next_slot = last && next_keys > 0 ? 1 - slot : slot;
    const int next_h = last ? 0 : h + 1;
    const int first = h * rows();
    const StreamRows next_k = k_rows(next_slot, next_h), next_v = v_rows(next_slot, next_h);
    scores(first, keys, k_rows(slot, h), next_k);
    bool all_visible = true;
    const RowMap map(p_, seq_, task_.head_k + h);
    const HeadFactors factors(p_, seq_, task_.head_k + h);
    if (factors.k.differ()) multiply_rows(key, keys, [&](int64_t j) { return factors.of_k(j); });
    for (int r = 0; r < rows(); ++r)
      all_visible &= finish_scores(map, first + r, x_.s + r * block_keys_, key, keys);
    softmax_step(first, round_up(keys, kTileN));
    if (factors.v.differ()) multiply_rows(key, keys, [&](int64_t j) { return factors.of_v(j); });
    values(first, keys, v_rows(slot, h), next_v, all_visible);
  }

  // Scores or weights of a head by a factor of each key.
  template <class Factor>
  void multiply_rows(int first_key, int keys, Factor factor) const {
    alignas(64) float factors[kStreamBlockKeys];
    const int columns = round_up(keys, kTileN);
    fill_factors(factors, first_key, keys, columns, factor);
    for (int r = 0; r < rows(); ++r) multiply_columns(x_.s + r * block_keys_, factors, columns);
  }

  // Of columns 0 .. keys, rounded up to kTileKeys.
  void scores(int first, int keys, StreamRows k, StreamRows ahead) const {
    for (int n = 0; n < keys; n += kTileKeys) {
      const StreamRows tile = readable(k.from(n), ahead.from(n), kTileKeys, dims_.d);
      for (int r = 0; r < rows(); r += kScoreM)
        with_rows<kScoreM>(rows() - r, [&]<int M>() {
          dot_keys<kRead, M>({x_.q + int64_t{first + r} * dims_.d_pad, dims_.d_pad, tile,
                              ahead.from(n), r == 0 && !kIsExpanded, dims_.d,
                              x_.s + r * block_keys_ + n, block_keys_});
        });
    }
  }

  void values(int first, int keys, StreamRows v, StreamRows ahead, bool all_visible) const {
    const bool skip_zeros = !all_visible && !values_finite(v, keys);
    for (int n = 0; n < keys; n += kValueKeys) {
      const int count = keys - n < kValueKeys ? keys - n : kValueKeys;
      const StreamRows tile = readable(v.from(n), ahead.from(n), count, dims_.d_v);
      const auto product = [&](int r) {
        return ValueProduct{.p = x_.s + r * block_keys_ + n,
                            .p_ld = block_keys_,
                            .v = tile,
                            .ahead = ahead.from(n),
                            .keys = count,
                            .d = dims_.d_v,
                            .o = x_.o + int64_t{first + r} * dims_.d_v_pad,
                            .o_ld = dims_.d_v_pad};
      };
      if (skip_zeros) {
        for (int r = 0; r < rows(); ++r) accumulate_values_skipping_zeros<kRead>(product(r));
        continue;
      }
      for (int r = 0; r < rows(); r += kValueM)
        with_rows<kValueM>(rows() - r, [&]<int M>() {
          accumulate_values<kRead, M>(product(r), r == 0 && !kIsExpanded);
        });
    }
  }

  // True if the row sees all keys.
  bool finish_scores(const RowMap& map, int r, float* s, int key, int keys) {
    const TileColumns t{0, round_up(keys, kTileN), key};
    const Row& row = x_.rows[r];
    if (modifiers_) modify_scores(p_, map, row, s, t, 1.f, nullptr);
    KeyRange seen = visible(row, t);
    if (seen.end > keys) seen.end = keys;
    fill_invisible(s, t, seen, -kInf);
    return seen.begin == 0 && seen.end == keys;
  }

  // s -> P of the rows of a head; their states and o follow the new maxima.
  void softmax_step(int first, int columns) {
    float scale[kStreamRows];
    for (int r = 0; r < rows(); ++r)
      scale[r] = raise_maximum(x_.s + r * block_keys_, 0, columns, x_.state[first + r]);
    for (int r = 0; r < rows(); ++r)
      weigh_scores(x_.s + r * block_keys_, 0, columns, x_.state[first + r]);
    for (int r = 0; r < rows(); ++r) {
      if (scale[r] == 1.f) continue;
      float* o = x_.o + int64_t{first + r} * dims_.d_v_pad;
      for (int i = 0; i < dims_.d_v_pad; i += kWidth) store(o + i, load(o + i) * scale[r]);
    }
  }

  bool values_finite(StreamRows v, int keys) const {
    bool finite = true;
    for (int n = 0; n < keys; ++n)
      finite &= read_row<T>(x_.buffer, v.row(n), dims_.d_v, dims_.d_v_pad);
    return finite;
  }

  const Flash_fwd_params& p_;
  const FwdTask& task_;
  const StreamScratch& x_;
  const Sequence seq_;
  const HeadDims dims_;
  const int block_keys_;
  const bool modifiers_;
  int block_ = 0;
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
