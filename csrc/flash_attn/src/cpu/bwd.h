// Backward attention, FlashAttention-2 (arXiv:2307.08691) algorithm 2, for one instruction set.
//
// With P = exp(x - lse) recomputed and delta = rowsum(dO * O) - dlse:
//   dV = P^T dO      dP = dO V^T      dS = P * (dP - delta)      dQ = scale dS K      dK = scale
//   dS^T Q
//
// A task owns a chunk of keys of one key-value head: K^T and V^T packed, K, dK and dV in fp32, all
// in L2. It walks over the blocks of rows (queries x GQA group) that see the chunk, from the last
// to the first, so that under a causal mask later chunks trail earlier ones instead of waiting for
// them. dK and dV have one owner. dQ is summed in fp32 in the order of the chunks: the task of
// chunk c adds to a block of rows when its turn counter says that all chunks before it have.
// Results therefore depend neither on the number of threads nor on timing.
#pragma once

#include <sched.h>

#include "cpu/exp2_bf16.h"
#include "cpu/far_rows.h"
#include "cpu/fwd.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr int kBwdTileRows = 96;  // a multiple of kTileM

struct BwdTile {
  int rows, keys;
};

inline BwdTile bwd_tile(const Flash_bwd_params& p) {
  const int d = round_up(static_cast<int>(p.d), kTileN),
            dv = round_up(static_cast<int>(p.d_v), kTileN);
  const int keys = (1 << 20) / (4 * (3 * d + 2 * dv));
  return {kBwdTileRows, keys >= 192 ? 192 : keys >= 96 ? 96 : keys >= 64 ? 64 : 32};
}

// Waits until *counter == value, which another thread will set.
inline void wait_for(const int* counter, int value) {
  for (int spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) != value; ++spins)
    if (spins > 1000) sched_yield();
}

// The heads in flight: sums into dq, and who may add next.
struct DqSlots {
  float* sums;        // [wave_heads][max_rows rounded up to the tile][d_pad]
  int64_t slot_size;  // floats
  int* turns;         // [wave_heads][row blocks]: chunks that have added to a block of rows
  int64_t row_blocks;
  int* chunks_done;  // [heads]
  int* head_done;    // [heads]: 1 once the head's slot is free again
};

struct BwdScratch {
  float *q, *dout;            // [tile.rows][d], [tile.rows][dv] padded to kTileN, row-major
  float *k_t, *v_t, *k;       // packed chunk
  float *dk, *dv;             // [keys][d], [keys][dv]
  float *s, *dp;              // [tile.rows][tile.keys]: P and dS
  float *buffer, *cap_slope;  // packing panel or row of bias; derivative of the softcap
  Row* rows;                  // [tile.rows]
  uint8_t* random;
};

inline BwdScratch carve_bwd(Carver& c, const Flash_bwd_params& p, const BwdTile& tile) {
  const int64_t d = round_up(static_cast<int>(p.d), kTileN),
                dv = round_up(static_cast<int>(p.d_v), kTileN);
  BwdScratch x;
  x.q = c.take<float>(tile.rows * d);
  x.dout = c.take<float>(tile.rows * dv);
  x.k_t = c.take<float>(tile.keys * d);
  x.v_t = c.take<float>(tile.keys * dv);
  x.k = c.take<float>(tile.keys * d);
  x.dk = c.take<float>((tile.keys + kTileM) * d);
  x.dv = c.take<float>((tile.keys + kTileM) * dv);
  x.s = c.take<float>(static_cast<int64_t>(tile.rows) * tile.keys + kWidth);
  x.dp = c.take<float>(static_cast<int64_t>(tile.rows) * tile.keys + kWidth);
  x.buffer = c.take<float>((d > dv ? d : dv) * kTileN + tile.keys + kWidth);
  x.cap_slope = c.take<float>(tile.keys);
  x.rows = c.take<Row>(tile.rows);
  x.random = c.take<uint8_t>(tile.keys + 64);
  return x;
}

// Elements from softmax_d's start to a sequence's first query.
inline int64_t dsoftmax_offset(const Flash_bwd_params& p, const Sequence& seq, int64_t head) {
  const int64_t first = p.cu_seqlens_q ? p.cu_seqlens_q[seq.batch] + 128 * int64_t{seq.batch} : 0;
  return seq.batch * p.dsoftmax_batch_stride + head * p.dsoftmax_head_stride + first;
}

class BwdTaskRunner {
 public:
  using Scratch = BwdScratch;
  static BwdTile tile(const Flash_bwd_params& p) { return bwd_tile(p); }
  static Scratch carve(Carver& c, const Flash_bwd_params& p, const BwdTile& tile) {
    return carve_bwd(c, p, tile);
  }

  BwdTaskRunner(const Flash_bwd_params& p, const BwdHead& head, int chunk, const BwdTile& tile,
                const BwdScratch& x, const FarRows& far_rows, float* dq_sums = nullptr,
                int* turns = nullptr)  // both of the head's slot
      : p_(p),
        head_(head),
        tile_(tile),
        x_(x),
        seq_(sequence(p, head.batch)),
        map_(p, seq_, head.head_k),
        d_(static_cast<int>(p.d)),
        d_v_(static_cast<int>(p.d_v)),
        d_pad_(round_up(d_, kTileN)),
        d_v_pad_(round_up(d_v_, kTileN)),
        chunk_(chunk),
        key_(chunk * tile.keys),
        keys_(seq_.seqlen_k - key_ < tile.keys ? seq_.seqlen_k - key_ : tile.keys),
        keys_pad_(round_up(keys_, kTileN)),
        modifiers_(has_score_modifiers(p)),
        dropout_(Dropout::make(p.p_dropout, p.seed, p.offset)),
        far_rows_(far_rows),
        dq_sums_(dq_sums),
        turns_(turns) {}

  void run() {
    pack_chunk();
    std::memset(x_.dk, 0, sizeof(float) * keys_pad_ * d_pad_);
    std::memset(x_.dv, 0, sizeof(float) * keys_pad_ * d_v_pad_);
    for (int block = (map_.rows() + tile_.rows - 1) / tile_.rows - 1; block >= 0; --block)
      attend(block);
    for (int j = 0; j < keys_; ++j) {
      const int64_t row = seq_.k_row + seq_.leftpad + key_ + j;
      write_row(p_.dtype, operand_row(p_.dk, p_.dtype, seq_.k_batch, row, head_.head_k),
                x_.dk + j * d_pad_, d_);
      write_row(p_.dtype, operand_row(p_.dv, p_.dtype, seq_.k_batch, row, head_.head_k),
                x_.dv + j * d_v_pad_, d_v_);
    }
  }

  const RowMap& map() const { return map_; }
  // The chunks that a block of rows sees.
  KeyRange chunks(int row0, int rows) const {
    const KeyRange seen = map_.keys(row0, row0 + rows - 1);
    if (seen.end <= seen.begin) return {0, 0};
    return {seen.begin / tile_.keys, (seen.end - 1) / tile_.keys + 1};
  }

  // Adds the scores of a block of rows over the chunk to the rows' states.
  void add_scores(int row0, int rows, RowState* states) {
    pack_chunk();
    load_rows(row0, rows);
    map_.for_bands(row0, row0 + rows, key_, keys_, [&](int row, int count, const TileColumns& own) {
      const int g = row - row0;
      product(x_.q + int64_t{g} * d_pad_, d_, d_pad_, x_.k_t, count, own, x_.s);
      for (int r = 0; r < count && own.begin < own.end; ++r)
        add_row(x_.rows[g + r], x_.s + int64_t{r} * tile_.keys, own, states[g + r]);
    });
  }

 protected:
  void pack_chunk() {
    const auto k_row = [&](int i) {
      return cache_row(p_, p_.k, seq_, seq_.leftpad + key_ + i, head_.head_k);
    };
    const auto v_row = [&](int i) {
      return cache_row(p_, p_.v, seq_, seq_.leftpad + key_ + i, head_.head_k);
    };
    pack_transposed(x_.k_t, p_.dtype, keys_, d_, k_row, x_.buffer);
    pack_transposed(x_.v_t, p_.dtype, keys_, d_v_, v_row, x_.buffer);
    k_finite_ = pack_natural(x_.k, p_.dtype, keys_, keys_pad_, d_, k_row, x_.buffer);
  }

  void attend(int block) {
    const int row0 = block * tile_.rows;
    const int rows = map_.rows() - row0 < tile_.rows ? map_.rows() - row0 : tile_.rows;
    const KeyRange seen = chunks(row0, rows);
    if (chunk_ < seen.begin || chunk_ >= seen.end) return;
    const TileColumns t = map_.columns(row0, rows, key_, keys_);
    load_rows(row0, rows);
    bool all_visible = true;
    map_.for_bands(row0, row0 + rows, key_, keys_, [&](int row, int count, const TileColumns& own) {
      all_visible &= scores(row, row - row0, count, own, t);
    });
    accumulate(t, rows, x_.s, x_.dout, d_v_pad_, x_.dv, !dout_finite_ && !all_visible);
    accumulate(t, rows, x_.dp, x_.q, d_pad_, x_.dk, !q_finite_ && !all_visible);
    int* turn = turns_ + block;
    wait_for(turn, chunk_ - seen.begin);
    map_.for_bands(row0, row0 + rows, key_, keys_, [&](int row, int count, const TileColumns& own) {
      add_dq(row, row - row0, count, own, chunk_ == seen.begin, !k_finite_ && !all_visible);
    });
    if (chunk_ == seen.end - 1) {
      for (int r = 0; r < rows; ++r)
        write_row(p_.dtype, map_.tensor_row(p_.dq, row0 + r),
                  dq_sums_ + (row0 + r) * int64_t{d_pad_}, d_, p_.scale_softmax);
    }
    __atomic_store_n(turn, chunk_ - seen.begin + 1, __ATOMIC_RELEASE);
  }

  void load_rows(int row0, int rows) {
    q_finite_ = dout_finite_ = true;
    for (int r = 0; r < rows; ++r) {
      x_.rows[r] = map_.row(row0 + r);
      q_finite_ &= read_row(p_.dtype, x_.q + int64_t{r} * d_pad_, map_.tensor_row(p_.q, row0 + r),
                            d_, d_pad_, p_.scale_softmax);
      dout_finite_ &= read_row(p_.dtype, x_.dout + int64_t{r} * d_v_pad_,
                               map_.tensor_row(p_.dout, row0 + r), d_v_, d_v_pad_);
    }
  }

  // P (with dropout) into s and dS into dp for rows [g, g + count) of the block, which see the
  // columns `own`; 0 in the other columns of t. True if every row sees every column of t.
  bool scores(int row0, int g, int count, const TileColumns& own, const TileColumns& t) {
    float* s = x_.s + int64_t{g} * tile_.keys;
    float* dp = x_.dp + int64_t{g} * tile_.keys;
    product(x_.q + int64_t{g} * d_pad_, d_, d_pad_, x_.k_t, count, own, s);
    product(x_.dout + int64_t{g} * d_v_pad_, d_v_, d_v_pad_, x_.v_t, count, own, dp);
    bool all_visible = true;
    for (int r = 0; r < count; ++r) {
      float* s_row = s + int64_t{r} * tile_.keys;
      float* dp_row = dp + int64_t{r} * tile_.keys;
      const KeyRange seen = visible(x_.rows[g + r], own);
      if (own.begin < own.end) softmax_bwd_step(row0 + r, x_.rows[g + r], s_row, dp_row, own);
      fill_invisible(s_row, t, seen, 0.f);
      fill_invisible(dp_row, t, seen, 0.f);
      all_visible &= seen.begin == t.begin && seen.end == t.end;
    }
    return all_visible;
  }

  // c = a b^T over the columns of t; b packed by pack_transposed.
  void product(const float* a, int d, int d_pad, const float* b, int count, const TileColumns& t,
               float* c) const {
    Product x{};
    x.k = d;
    x.a = a;
    x.a_ld = d_pad;
    x.c = c + t.begin;
    x.c_ld = tile_.keys;
    multiply_in_pieces(count, t.end - t.begin, x,
                       transposed_operand(b + int64_t{t.begin} * d_pad, d));
  }

  // From products, scores / score_scale_, to scores.
  void finish_scores(const Row& row, float* s, const TileColumns& t, float* cap_slope) const {
    if (score_scale_ != 1.f)
      for (int j = t.begin; j < t.end; j += kWidth) store(s + j, load(s + j) * score_scale_);
    if (modifiers_) modify_scores(p_, map_, row, s, t, x_.buffer, cap_slope);
  }

  void add_row(const Row& row, float* s, const TileColumns& t, RowState& state) const {
    finish_scores(row, s, t, nullptr);
    fill_invisible(s, t, visible(row, t), -kInf);
    flash_step(s, t.begin, t.end, state);
  }

  // What is left to subtract from a row's scores to have the logarithm of P.
  float subtract_reference(int row_index, const Row& row, float* s, const TileColumns& t) const {
    const float lse = p_.softmax_lse[map_.lse_index(row_index)];
    if (!is_far(lse)) return lse;
    const RowReference& reference = far_rows_.at(seq_.batch, row);
    for (int j = t.begin; j < t.end; j += kWidth) store(s + j, load(s + j) - set1(reference.score));
    return reference.log_sum;
  }

  // s holds products. With kForBf16, P will be rounded to bf16.
  template <bool kForBf16 = false>
  void softmax_bwd_step(int row_index, const Row& row, float* s, float* dp, const TileColumns& t) {
    float* cap_slope = p_.softcap > 0.f ? x_.cap_slope : nullptr;
    finish_scores(row, s, t, cap_slope);
    if (dropout_.enabled) random_row_bytes(dropout_, map_.batch_head(row), row.query, t, x_.random);
    const Vec lse = set1(subtract_reference(row_index, row, s, t));
    const Vec delta = set1(p_.dsoftmax_sum[dsoftmax_index(row)]);
    for (int j = t.begin; j < t.end; j += kWidth) {
      const Vec exponent = load(s + j) - lse;
      const Vec p = kForBf16 ? exp2_bf16(exponent * kLog2e) : exp(exponent);
      Vec dropped = p, dp_j = load(dp + j);
      if (dropout_.enabled) {
        const VecI keep = kept(dropout_, x_.random, j);
        dropped = select(keep, p * dropout_.rescale, zero());
        dp_j = select(keep, dp_j * dropout_.rescale, zero());
      }
      store(s + j, dropped);
      store(dp + j, p * (dp_j - delta));
    }
    if (p_.dbias.ptr) add_dbias(row, dp, t);
    if (cap_slope)
      for (int j = t.begin; j < t.end; j += kWidth)
        store(dp + j, load(dp + j) * load(cap_slope + j));
  }

  void add_dbias(const Row& row, const float* ds, const TileColumns& t) const {
    const Bias& bias = p_.dbias;
    const KeyRange seen = visible(row, t);
    float* dst =
        static_cast<float*>(bias.ptr) + map_.bias_offset(bias, row) + t.first_key * bias.col_stride;
    for (int j = seen.begin; j < seen.end; ++j) dst[j * bias.col_stride] += ds[j];
  }

  // c[keys of t][d] += a[rows][keys]^T b[rows][d]
  void accumulate(const TileColumns& t, int rows, const float* a, const float* b, int d_pad,
                  float* c, bool skip_zeros) const {
    Product x{};
    x.k = rows;
    x.a = a + t.begin;
    x.a_ld = tile_.keys;
    x.c = c + int64_t{t.begin} * d_pad;
    x.c_ld = d_pad;
    x.init = Init::kKeep;
    multiply<true>(t.end - t.begin, d_pad, x, row_major_operand(b, d_pad), skip_zeros);
  }

  void add_dq(int row, int g, int count, const TileColumns& t, bool first, bool skip_zeros) const {
    OperandB k = natural_operand(x_.k, keys_pad_);
    k.data += t.begin * kTileN;
    Product x{};
    x.k = t.end - t.begin;
    x.a = x_.dp + int64_t{g} * tile_.keys + t.begin;
    x.a_ld = tile_.keys;
    x.c = dq_sums_ + int64_t{row} * d_pad_;
    x.c_ld = d_pad_;
    x.init = first ? Init::kZero : Init::kKeep;
    multiply<false>(count, d_pad_, x, k, skip_zeros);
  }

  int64_t dsoftmax_index(const Row& row) const {
    return dsoftmax_offset(p_, seq_, row.head) + row.query;
  }

  const Flash_bwd_params& p_;
  const BwdHead& head_;
  const BwdTile& tile_;
  const BwdScratch& x_;
  const Sequence seq_;
  const RowMap map_;
  const int d_, d_v_, d_pad_, d_v_pad_;
  const int chunk_, key_, keys_, keys_pad_;
  const bool modifiers_;
  const Dropout dropout_;
  const FarRows& far_rows_;
  float* const dq_sums_;
  int* const turns_;
  bool k_finite_ = true, q_finite_ = true, dout_finite_ = true;
  float score_scale_ = 1.f;  // of the products q.k: 1 where the scale is already part of q
};

// softmax_d = rowsum(dO * O) - dlse of a block of rows; dq of blocks that see no key is 0. True if
// any row is far.
inline bool prepare_rows(const Flash_bwd_params& p, const Sequence& seq, int head_k, int row0,
                         const BwdTile& tile, float* buffer) {
  const RowMap map(p, seq, head_k);
  const int end = map.rows() - row0 < tile.rows ? map.rows() : row0 + tile.rows;
  const KeyRange seen = map.keys(row0, end - 1);
  const int dv = static_cast<int>(p.d_v), dv_pad = round_up(dv, kTileN);
  bool far = false;
  for (int row = row0; row < end; ++row) {
    far |= is_far(p.softmax_lse[map.lse_index(row)]);
    read_row(p.dtype, buffer, map.tensor_row(p.o, row), dv, dv_pad);
    read_row(p.dtype, buffer + dv_pad, map.tensor_row(p.dout, row), dv, dv_pad);
    Vec sum = zero();
    for (int i = 0; i < dv_pad; i += kWidth)
      sum = fma(load(buffer + i), load(buffer + dv_pad + i), sum);
    float delta = reduce_add(sum);
    const int64_t head = map.head(row), query = map.query(row);
    if (p.dlse)
      delta -= p.dlse[seq.batch * p.dlse_batch_stride + head * p.dlse_head_stride +
                      (seq.lse_row + query) * p.dlse_row_stride];
    p.dsoftmax_sum[dsoftmax_offset(p, seq, head) + query] = delta;
    if (seen.end <= seen.begin) zero_row(p.dtype, map.tensor_row(p.dq, row), p.d);
  }
  return far && seen.begin < seen.end;
}

// The sink is a key with value 0: its gradient is sum over queries of exp(sink - lse) (0 - delta).
inline void store_ds_aux(const Flash_bwd_params& p, int head) {
  const float sink = sink_logit(p, head);
  float sum = 0.f;
  for (int b = 0; b < p.b; ++b) {
    const Sequence seq = sequence(p, b);
    const float* lse =
        p.softmax_lse + b * p.lse_batch_stride + head * p.lse_head_stride + seq.lse_row;
    const float* delta = p.dsoftmax_sum + dsoftmax_offset(p, seq, head);
    for (int i = 0; i < seq.seqlen_q; ++i) sum -= exp(sink - lse[i]) * delta[i];
  }
  p.ds_aux[head] = sum;
}

inline void zero_dbias(const Bias& x) {
  for (int64_t b = 0; b < x.b; ++b)
    for (int64_t h = 0; h < x.h; ++h)
      for (int64_t i = 0; i < x.rows; ++i) {
        float* row =
            static_cast<float*>(x.ptr) + b * x.batch_stride + h * x.head_stride + i * x.row_stride;
        for (int64_t j = 0; j < x.cols; ++j) row[j * x.col_stride] = 0.f;
      }
}

// True if any row is far.
inline bool prepare_bwd(const Flash_bwd_params& p, const BwdPlan& plan, const BwdTile& tile,
                        int threads) {
  const int64_t entries = p.cu_seqlens_q ? 1 : p.b;
  const int64_t columns = p.cu_seqlens_q ? p.total_q + 128 * p.b : (p.seqlen_q + 127) / 128 * 128;
  for (int64_t b = 0; b < entries && columns > 0; ++b)
    for (int64_t h = 0; h < p.h; ++h)
      std::memset(p.dsoftmax_sum + b * p.dsoftmax_batch_stride + h * p.dsoftmax_head_stride, 0,
                  columns * sizeof(float));
  if (p.dbias.ptr) zero_dbias(p.dbias);
  const int64_t buffer_size = 2 * round_up(static_cast<int>(p.d_v), kTileN);
  Scratch scratch(threads * buffer_size * sizeof(float));
  const int64_t blocks = (plan.max_rows + tile.rows - 1) / tile.rows;
  bool any_far = false;
  parallel_for(p.b * p.h_k * blocks, threads, [&](int64_t i, int thread) {
    const int head = static_cast<int>(i / blocks);
    const Sequence seq = sequence(p, static_cast<int>(head / p.h_k));
    const int row0 = static_cast<int>(i % blocks) * tile.rows;
    if (row0 >= seq.seqlen_q * (p.h / p.h_k)) return;
    if (prepare_rows(p, seq, static_cast<int>(head % p.h_k), row0, tile,
                     reinterpret_cast<float*>(scratch.data()) + thread * buffer_size))
      __atomic_store_n(&any_far, true, __ATOMIC_RELAXED);
  });
  return any_far;
}

// References of the far rows among the block that begins at row0.
template <class Runner>
inline void find_references(const Flash_bwd_params& p, const BwdHead& head, int row0,
                            const BwdTile& tile, const typename Runner::Scratch& x,
                            RowState* states, const FarRows& far_rows) {
  const Sequence seq = sequence(p, head.batch);
  const RowMap map(p, seq, head.head_k);
  const int rows = map.rows() - row0 < tile.rows ? map.rows() - row0 : tile.rows;
  const auto lse = [&](int r) { return p.softmax_lse[map.lse_index(row0 + r)]; };
  bool any_far = false;
  for (int r = 0; r < rows; ++r) {
    states[r] = RowState{};
    any_far |= is_far(lse(r));
  }
  if (!any_far) return;
  const KeyRange chunks = Runner(p, head, 0, tile, x, far_rows).chunks(row0, rows);
  for (int chunk = chunks.begin; chunk < chunks.end; ++chunk)
    Runner(p, head, chunk, tile, x, far_rows).add_scores(row0, rows, states);
  for (int r = 0; r < rows; ++r) {
    const Row row = map.row(row0 + r);
    if (p.s_aux) add_sink(p, row.head, states[r]);
    if (is_far(lse(r))) far_rows.at(seq.batch, row) = far_reference(states[r], lse(r));
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
                 const int row0 = static_cast<int>(i % blocks) * tile.rows;
                 if (row0 >= sequence(p, head.batch).seqlen_q * (p.h / p.h_k)) return;
                 Carver carver(scratch.data() + measure.used() * thread);
                 RowState* states = carver.take<RowState>(tile.rows);
                 const typename Runner::Scratch x = Runner::carve(carver, p, tile);
                 find_references<Runner>(p, head, row0, tile, x, states, far_rows);
               });
}

inline DqSlots carve_slots(Carver& c, const Flash_bwd_params& p, const BwdPlan& plan,
                           const BwdTile& tile) {
  DqSlots x;
  x.row_blocks = (plan.max_rows + tile.rows - 1) / tile.rows;
  x.slot_size = x.row_blocks * tile.rows * round_up(static_cast<int>(p.d), kTileN);
  x.turns = c.take<int>(plan.wave_heads * x.row_blocks);
  x.chunks_done = c.take<int>(static_cast<int64_t>(plan.heads.size()));
  x.head_done = c.take<int>(static_cast<int64_t>(plan.heads.size()));
  x.sums = c.take<float>(plan.wave_heads * x.slot_size);
  return x;
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
  std::memset(slots.turns, 0, plan.wave_heads * slots.row_blocks * sizeof(int));
  const BwdHead* heads = plan.heads.data();
  for (size_t h = 0; h < plan.heads.size(); ++h) {
    slots.chunks_done[h] = 0;
    slots.head_done[h] = 0;
  }
  // A bias gradient broadcast over keys is shared by the chunks of a head, which then run one after
  // the other.
  const bool chunks_share_bias = p.dbias.ptr && p.dbias.cols < p.seqlen_k;
  const BwdTask* tasks = plan.tasks.data();
  parallel_for(static_cast<int64_t>(plan.tasks.size()), threads, [&](int64_t i, int thread) {
    const int h = tasks[i].head, slot = h % plan.wave_heads;
    Carver carver(scratch.data() + thread_bytes * thread);
    const typename Runner::Scratch x = Runner::carve(carver, p, tile);
    if (h >= plan.wave_heads) wait_for(slots.head_done + h - plan.wave_heads, 1);
    if (chunks_share_bias) wait_for(slots.chunks_done + h, tasks[i].chunk);
    int* turns = slots.turns + slot * slots.row_blocks;
    Runner(p, heads[h], tasks[i].chunk, tile, x, far_rows, slots.sums + slot * slots.slot_size,
           turns)
        .run();
    if (__atomic_add_fetch(slots.chunks_done + h, 1, __ATOMIC_ACQ_REL) == heads[h].chunks) {
      std::memset(turns, 0, slots.row_blocks * sizeof(int));
      __atomic_store_n(slots.head_done + h, 1, __ATOMIC_RELEASE);
    }
  });
}

// Runner does one task: BwdTaskRunner, or one with other products.
template <class Runner = BwdTaskRunner>
inline void mha_bwd(const Flash_bwd_params& p) {
  const BwdTile tile = Runner::tile(p);
  const BwdPlan plan = plan_bwd(p, tile.keys, num_threads());
  const int threads = threads_for(plan.flops);
  if (prepare_bwd(p, plan, tile, threads)) {
    Scratch references(p.b * p.h * p.seqlen_q * sizeof(RowReference));
    const FarRows far_rows{reinterpret_cast<RowReference*>(references.data()), p.h, p.seqlen_q};
    find_far_rows<Runner>(p, plan, tile, threads, far_rows);
    run_bwd_tasks<Runner>(p, plan, tile, threads, far_rows);
  } else {
    run_bwd_tasks<Runner>(p, plan, tile, threads, FarRows{});
  }
  if (p.ds_aux)
    parallel_for(p.h, threads, [&](int64_t h, int) { store_ds_aux(p, static_cast<int>(h)); });
  if (p.cu_seqlens_q) {
    zero_rows_beyond(p.dq, p.dtype, p.cu_seqlens_q[p.b], p.total_q, p.h, p.d);
    zero_rows_beyond(p.dk, p.dtype, p.cu_seqlens_k[p.b], p.total_k, p.h_k, p.d);
    zero_rows_beyond(p.dv, p.dtype, p.cu_seqlens_k[p.b], p.total_k, p.h_k, p.d_v);
  }
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
