// Backward attention, FlashAttention-2 (arXiv:2307.08691) algorithm 2, in fp32 FMAs (tile_fma.h).
//
// With P = exp(x - lse) recomputed and delta = rowsum(dO * O) - dlse:
//
//   dV = P^T dO
//   dP = dO V^T
//   dS = P * (dP - delta)
//   dQ = scale dS K
//   dK = scale dS^T Q
//
// A task owns a chunk of keys of one key-value head: K^T and V^T packed, K, dK and dV in fp32, all
// in L2. It walks over the blocks of rows (queries x GQA group) that see the chunk, from the last
// to the first, so that under a causal mask later chunks trail earlier ones instead of waiting for
// them. dK and dV have one owner. dQ is summed in fp32 in the order of the chunks: the task of
// chunk c adds to a block of rows when its turn counter says that all chunks before it have.
// Results therefore depend neither on the number of threads nor on timing.
//
// softmax_scale enters with Q: its rows are multiplied by it as they are read, so that S holds
// scores and dK needs no scale of its own; dQ is multiplied by it as it is written. (bwd_tiles.h
// packs Q as it is.)
#pragma once

#include "cpu/bwd_context.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr int kBwdTileRows = kWidth == 16 ? 112 : 96;  // a multiple of kTileM
inline constexpr int kBwdTileKeys = 192;                      // of kTileMTransposed and kTileN

struct BwdScratch {
  float *q, *dout;       // [tile.rows][d], [tile.rows][dv] padded to kTileN, row-major
  float *k_t, *v_t, *k;  // packed chunk
  float *dk, *dv;        // [keys][d], [keys][dv]
  float *s, *dp;         // [tile.rows][tile.keys]: P and dS
  Row* rows;             // [tile.rows]
  float* buffer;         // a packing panel
  float* cap_slope;      // [tile.keys], of a row
  uint8_t* random;       // [tile.rows][tile.keys + 32], with dropout
};

class BwdTaskRunner {
 public:
  using Scratch = BwdScratch;

  static BwdTile tile(const Flash_bwd_params& p) {
    const HeadDims dims(p);
    const int keys = (1 << 20) / (4 * (3 * dims.d_pad + 2 * dims.d_v_pad));
    return {kBwdTileRows, keys >= kBwdTileKeys ? kBwdTileKeys
                          : keys >= 96         ? 96
                          : keys >= 64         ? 64
                                               : 32};
  }

  static Scratch carve(Carver& c, const Flash_bwd_params& p, const BwdTile& tile) {
    const HeadDims dims(p);
    const int64_t d = dims.d_pad, dv = dims.d_v_pad;
    Scratch x;
    x.q = c.take<float>(tile.rows * d);
    x.dout = c.take<float>(tile.rows * dv);
    x.k_t = c.take<float>(tile.keys * d);
    x.v_t = c.take<float>(tile.keys * dv);
    x.k = c.take<float>(tile.keys * d);
    x.dk = c.take<float>((tile.keys + kTileM) * d);
    x.dv = c.take<float>((tile.keys + kTileM) * dv);
    x.s = c.take<float>(static_cast<int64_t>(tile.rows) * tile.keys + kWidth);
    x.dp = c.take<float>(static_cast<int64_t>(tile.rows) * tile.keys + kWidth);
    x.buffer = c.take<float>(dims.largest_pad() * kTileN);
    x.cap_slope = c.take<float>(tile.keys);
    x.rows = c.take<Row>(tile.rows);
    x.random = c.take<uint8_t>(p.p_dropout > 0.f ? tile.rows * (tile.keys + 32) : 0);
    return x;
  }

  BwdTaskRunner(const Flash_bwd_params& p, const BwdHead& head, int chunk, const BwdTile& tile,
                const Scratch& x, const FarRows& far_rows, const DqSlot& dq)
      : ctx_(p, head, chunk, tile, far_rows, dq, 1.f),
        x_(x),
        keys_pad_(round_up(ctx_.keys, kTileN)) {}

  void run() {
    pack_chunk();
    std::memset(x_.dk, 0, sizeof(float) * keys_pad_ * ctx_.d_pad);
    std::memset(x_.dv, 0, sizeof(float) * keys_pad_ * ctx_.d_v_pad);
    ctx_.for_blocks([&](const RowBlock& block) { attend(block); });
    for (int j = 0; j < ctx_.keys; ++j) {
      ctx_.write_gradient(ctx_.p.dk, j, x_.dk + j * ctx_.d_pad, ctx_.d);
      ctx_.write_gradient(ctx_.p.dv, j, x_.dv + j * ctx_.d_v_pad, ctx_.d_v);
    }
  }

  // Adds the scores of a block of rows over the chunk to the rows' states.
  void add_scores(const RowBlock& block, RowState* states) {
    pack_chunk();
    load_rows(block);
    for_bands(block, [&](int row, int count, const TileColumns& own) {
      const int g = row - block.row0;
      product(x_.q + int64_t{g} * ctx_.d_pad, ctx_.d, ctx_.d_pad, x_.k_t, count, own, x_.s);
      for (int r = 0; r < count && own.begin < own.end; ++r)
        ctx_.add_row(x_.rows[g + r], x_.s + int64_t{r} * ctx_.tile.keys, own, states[g + r]);
    });
  }

 private:
  template <class F>  // F(row, rows, columns)
  void for_bands(const RowBlock& block, F f) const {
    ctx_.map.for_bands(block.row0, block.row0 + block.rows, ctx_.key, ctx_.keys, f);
  }

  void pack_chunk() {
    const Flash_bwd_params& p = ctx_.p;
    const auto k_rows = ctx_.key_rows(p.k, ctx_.key), v_rows = ctx_.key_rows(p.v, ctx_.key);
    pack_transposed(x_.k_t, p.dtype, ctx_.keys, ctx_.d, k_rows, x_.buffer);
    pack_transposed(x_.v_t, p.dtype, ctx_.keys, ctx_.d_v, v_rows, x_.buffer);
    k_finite_ = pack_natural(x_.k, p.dtype, ctx_.keys, keys_pad_, ctx_.d, k_rows, x_.buffer);
  }

  void attend(const RowBlock& block) {
    const TileColumns t = ctx_.map.columns(block.row0, block.rows, ctx_.key, ctx_.keys);
    load_rows(block);
    bool all_visible = true;
    for_bands(block, [&](int row, int count, const TileColumns& own) {
      all_visible &= scores(row, row - block.row0, count, own, t);
    });
    accumulate(t, block.rows, x_.s, x_.dout, ctx_.d_v_pad, x_.dv, !dout_finite_ && !all_visible);
    accumulate(t, block.rows, x_.dp, x_.q, ctx_.d_pad, x_.dk, !q_finite_ && !all_visible);
    ctx_.wait_for_turn(block);
    for_bands(block, [&](int row, int count, const TileColumns& own) {
      add_dq(row, row - block.row0, count, own, ctx_.is_first(block), !k_finite_ && !all_visible);
    });
    ctx_.end_turn(block);
  }

  void load_rows(const RowBlock& block) {
    const Flash_bwd_params& p = ctx_.p;
    q_finite_ = dout_finite_ = true;
    for (int r = 0; r < block.rows; ++r) {
      const int row = block.row0 + r;
      x_.rows[r] = ctx_.map.row(row);
      q_finite_ &= read_row(p.dtype, x_.q + int64_t{r} * ctx_.d_pad, ctx_.map.tensor_row(p.q, row),
                            ctx_.d, ctx_.d_pad, p.scale_softmax);
      dout_finite_ &= read_row(p.dtype, x_.dout + int64_t{r} * ctx_.d_v_pad,
                               ctx_.map.tensor_row(p.dout, row), ctx_.d_v, ctx_.d_v_pad);
    }
  }

  // P (with dropout) into s and dS into dp for rows [g, g + count) of the block, which see the
  // columns `own`; 0 in the other columns of t. True if every row sees every column of t.
  bool scores(int row0, int g, int count, const TileColumns& own, const TileColumns& t) {
    float* s = x_.s + int64_t{g} * ctx_.tile.keys;
    float* dp = x_.dp + int64_t{g} * ctx_.tile.keys;
    product(x_.q + int64_t{g} * ctx_.d_pad, ctx_.d, ctx_.d_pad, x_.k_t, count, own, s);
    product(x_.dout + int64_t{g} * ctx_.d_v_pad, ctx_.d_v, ctx_.d_v_pad, x_.v_t, count, own, dp);
    const int random_ld = ctx_.tile.keys + 32;
    if (ctx_.dropout.enabled) ctx_.random_bytes(x_.rows + g, count, own, x_.random, random_ld);
    bool all_visible = true;
    for (int r = 0; r < count; ++r) {
      const Row& row = x_.rows[g + r];
      float* s_row = s + int64_t{r} * ctx_.tile.keys;
      float* dp_row = dp + int64_t{r} * ctx_.tile.keys;
      const KeyRange seen = visible(row, own);
      if (own.begin < own.end)
        ctx_.softmax_bwd_step(row0 + r, row, s_row, dp_row, own,
                              {x_.cap_slope, x_.random + r * random_ld});
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
    x.c_ld = ctx_.tile.keys;
    multiply_in_pieces(count, t.end - t.begin, x,
                       transposed_operand(b + int64_t{t.begin} * d_pad, d));
  }

  // c[keys of t][d] += a[rows][keys]^T b[rows][d]
  void accumulate(const TileColumns& t, int rows, const float* a, const float* b, int d_pad,
                  float* c, bool skip_zeros) const {
    Product x{};
    x.k = rows;
    x.a = a + t.begin;
    x.a_ld = ctx_.tile.keys;
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
    x.a = x_.dp + int64_t{g} * ctx_.tile.keys + t.begin;
    x.a_ld = ctx_.tile.keys;
    x.c = ctx_.dq_row(row);
    x.c_ld = ctx_.d_pad;
    x.init = first ? Init::kZero : Init::kKeep;
    multiply<false>(count, ctx_.d_pad, x, k, skip_zeros);
  }

  const BwdContext ctx_;
  const Scratch& x_;
  const int keys_pad_;
  bool k_finite_ = true, q_finite_ = true, dout_finite_ = true;
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
