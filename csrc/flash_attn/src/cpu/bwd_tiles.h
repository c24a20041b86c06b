// Backward attention in products of bf16 pairs: tile registers (AMX), or vectors (AVX-512-BF16).
// The tasks of bwd_run.h, as bwd.h does them in FMAs.
//
// For a block of rows and a block of the chunk's keys, both up to 256 with one term:
//
//   S = Q K^T, dP = dO V^T    units of 32 rows x 64 keys in L1; P and dS of one unit are made while
//                             the tile unit computes the next
//   dV^T += dO^T P            sums over the rows: P and dS as pairs of rows
//   dK^T += Q^T dS
//   dQ   += dS K              sums over the keys: dS as it lies
//
// dK and dV are transposed until the chunk is complete: P and dS then need no transposition.
//
// softmax_scale enters after the products: Q is packed as it is, since a scaled bf16 number is not
// one. P is made of score_scale times a product (weigh_plain), or of a score that has been
// multiplied before its modifiers (softmax_bwd_step); dK and dQ are multiplied as they are written.
// (bwd.h scales Q.)
#pragma once

#include "cpu/bwd_context.h"
#include "cpu/tile_units.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr int kBwdBlockKeys = 256;

struct BwdTilesScratch {
  uint32_t *q, *dout;                 // [tile.rows] x [d], [dv]: A of S and dP
  uint32_t *q_t, *dout_t;             // their transposes: A of dK^T and dV^T
  uint32_t *k_t, *v_t, *k;            // the chunk: B of S, dP and dQ
  uint32_t *p_pairs, *ds_pairs, *ds;  // [tile.rows] x [kBwdBlockKeys]
  float *dk, *dv;                     // [d], [dv] x [keys], fp32 tiles
  float* units;                       // two of S and dP, [32][kUnitKeys] each
  float *lse, *delta;                 // [tile.rows]: what to add to exponents, to take from dP
  Row* rows;                          // [tile.rows]
  ScoreScratch row;                   // of kUnitKeys
  uint8_t* random;                    // of kUnitKeys
  uint8_t *spoilt_q, *spoilt_dout, *spoilt_k;
  Staging staging;
};

template <class Tile, class Terms>
class BwdTilesRunner {
 public:
  using Scratch = BwdTilesScratch;
  using Inputs = typename Terms::Inputs;
  static constexpr int kTerms = Terms::kTerms;
  static constexpr int kRows = 256 / kTerms / kBlockRows * kBlockRows;

  static BwdTile tile(const Flash_bwd_params& p) {
    const HeadDims dims(p);
    const int d = dims.d_pad, dv = dims.d_v_pad;
    const int keys = (1 << 20) / (2 * kTerms * (2 * d + dv) + 4 * (d + dv)) / kUnitKeys * kUnitKeys;
    return {kRows, keys < kUnitKeys ? kUnitKeys : keys > 512 ? 512 : keys};
  }

  static Scratch carve(Carver& c, const Flash_bwd_params& p, const BwdTile& tile) {
    const HeadDims dims(p);
    const int64_t d = dims.d_pad, dv = dims.d_v_pad;
    const auto grid = [&](int64_t rows, int64_t depth) {
      return c.take<uint32_t>(packed_words(rows, depth, kTerms));
    };
    Scratch x{};
    x.q = grid(kRows, d);
    x.dout = grid(kRows, dv);
    x.q_t = grid(kRows, d);
    x.dout_t = grid(kRows, dv);
    x.k_t = grid(tile.keys, d);
    x.v_t = grid(tile.keys, dv);
    x.k = grid(tile.keys, d);
    x.p_pairs = grid(kRows, kBwdBlockKeys);
    x.ds_pairs = grid(kRows, kBwdBlockKeys);
    x.ds = grid(kRows, kBwdBlockKeys);
    x.dk = c.take<float>(tile.keys * d);
    x.dv = c.take<float>(tile.keys * dv);
    x.units = c.take<float>(4 * kBlockRows * kUnitKeys);
    x.lse = c.take<float>(kRows);
    x.delta = c.take<float>(kRows);
    x.staging = carve_staging(c, kTerms, dims.largest_pad());
    x.row.cap_slope = c.take<float>(kUnitKeys);
    x.rows = c.take<Row>(kRows);
    x.random = c.take<uint8_t>(kUnitKeys + 64);
    x.row.random = x.random;
    x.spoilt_q = c.take<uint8_t>(kRows);
    x.spoilt_dout = c.take<uint8_t>(kRows);
    x.spoilt_k = c.take<uint8_t>(tile.keys);
    return x;
  }

  BwdTilesRunner(const Flash_bwd_params& p, const BwdHead& head, int chunk, const BwdTile& tile,
                 const Scratch& x, const FarRows& far_rows, const DqSlot& dq)
      : ctx_(p, head, chunk, tile, far_rows, dq, p.scale_softmax),
        x_(x),
        q_(packed_grid(x.q, kRows, ctx_.d_pad)),
        dout_(packed_grid(x.dout, kRows, ctx_.d_v_pad)),
        q_t_(packed_grid(x.q_t, ctx_.d_pad, kRows)),
        dout_t_(packed_grid(x.dout_t, ctx_.d_v_pad, kRows)),
        k_t_(packed_grid(x.k_t, tile.keys, ctx_.d_pad)),
        v_t_(packed_grid(x.v_t, tile.keys, ctx_.d_v_pad)),
        k_(packed_grid(x.k, ctx_.d_pad, tile.keys)),
        p_pairs_(packed_grid(x.p_pairs, kBwdBlockKeys, kRows)),
        ds_pairs_(packed_grid(x.ds_pairs, kBwdBlockKeys, kRows)),
        ds_(packed_grid(x.ds, kRows, kBwdBlockKeys)) {}

  void run() {
    Tile::configure();
    pack_chunk();
    std::memset(x_.dk, 0, sizeof(float) * ctx_.tile.keys * ctx_.d_pad);
    std::memset(x_.dv, 0, sizeof(float) * ctx_.tile.keys * ctx_.d_v_pad);
    ctx_.for_blocks([&](const RowBlock& block) { attend(block); });
    store_transposed(x_.dk, ctx_.p.dk, ctx_.d, ctx_.p.scale_softmax);
    store_transposed(x_.dv, ctx_.p.dv, ctx_.d_v, 1.f);
    Tile::release();
  }

  // Adds the scores of a block of rows over the chunk to the rows' states.
  void add_scores(const RowBlock& block, RowState* states) {
    Tile::configure();
    pack_chunk();
    for (int r = 0; r < block.rows; ++r) x_.rows[r] = ctx_.map.row(block.row0 + r);
    pack_block(ctx_.p.q, block, ctx_.d, q_, q_t_, x_.spoilt_q);
    for (int first = 0; first < ctx_.keys; first += kBwdBlockKeys) {
      find_columns(block, first);
      for_units(block.rows, [&](const Unit& unit) {
        const TileProduct s = unit_product(unit, q_, k_t_, unit.s);
        multiply<Tile, Inputs>(s, row_tiles(unit.rows), 0, (unit.end - unit.begin) / kTileSide);
        for (int r = unit.sub * kBlockRows; r < unit.sub * kBlockRows + unit.rows; ++r)
          ctx_.add_row(x_.rows[r], unit.s + (r % kBlockRows) * kUnitKeys, columns(unit), states[r]);
      });
    }
    Tile::release();
  }

 private:
  // Rows [32 sub, 32 sub + rows) of the block over the columns [begin, end) of the block of keys.
  struct Unit {
    int sub, rows;
    int begin, end;
    float *s, *dp;  // [32][kUnitKeys]
    bool plain;     // 32 rows, none far, all see every column, and the products are the scores
  };

  void pack_chunk() {
    const Flash_bwd_params& p = ctx_.p;
    const auto k_rows = ctx_.key_rows(p.k, ctx_.key), v_rows = ctx_.key_rows(p.v, ctx_.key);
    k_finite_ = true;
    for (int i = 0; i < ctx_.keys; i += kTileDepth) {
      const RowGroup v_group{p.dtype, i, kTileDepth, ctx_.keys, ctx_.d_v};
      stage_rows<kTerms>(x_.staging, v_group, v_rows, nullptr);
      pack_key_columns<kTerms>(v_t_, i, x_.staging);
      const RowGroup k_group{p.dtype, i, kTileDepth, ctx_.keys, ctx_.d};
      const bool finite = stage_rows<kTerms>(x_.staging, k_group, k_rows, nullptr);
      pack_key_columns<kTerms>(k_t_, i, x_.staging);
      std::memset(x_.spoilt_k + i, 0, kTileDepth);
      if (!finite) stage_rows<kTerms>(x_.staging, k_group, k_rows, x_.spoilt_k + i);
      pack_pairs<kTerms>(k_, i / kTileDepth, ctx_.d_pad, x_.staging);
      k_finite_ &= finite;
    }
  }

  // A tensor of rows as A, and its transpose. True if all is finite.
  bool pack_block(const Operand& tensor, const RowBlock& block, int d, const Packed& natural,
                  const Packed& transposed, uint8_t* spoilt) {
    const auto row = [&](int i) -> const void* {
      return ctx_.map.tensor_row(tensor, block.row0 + i);
    };
    bool all_finite = true;
    for (int i = 0; i < block.rows; i += kTileDepth) {
      const RowGroup group{ctx_.p.dtype, i, kTileDepth, block.rows, d};
      const bool finite = stage_rows<kTerms>(x_.staging, group, row, nullptr);
      for (int r = 0; r < kTileDepth; ++r) copy_staged_row<kTerms>(natural, i + r, x_.staging, r);
      std::memset(spoilt + i, 0, kTileDepth);
      if (!finite) stage_rows<kTerms>(x_.staging, group, row, spoilt + i);
      pack_transpose<kTerms>(transposed, i / kTileDepth, round_up(d, kTileDepth), x_.staging);
      all_finite &= finite;
    }
    return all_finite;
  }

  void attend(const RowBlock& block) {
    load_rows(block);
    bool waiting = true;
    for (int first = 0; first < ctx_.keys; first += kBwdBlockKeys) {
      find_columns(block, first);
      weigh_block(block);
      accumulate_transposed(block, first);
      if (waiting) take_turn(block);
      waiting = false;
      add_dq_block(block, first);
    }
    ctx_.end_turn(block);
  }

  void load_rows(const RowBlock& block) {
    any_far_ = false;
    for (int r = 0; r < block.rows; ++r) {
      x_.rows[r] = ctx_.map.row(block.row0 + r);
      const float lse = ctx_.lse(block.row0 + r);
      any_far_ |= is_far(lse);
      x_.lse[r] = -lse * kLog2e;
      x_.delta[r] = ctx_.delta(x_.rows[r]);
    }
    pack_block(ctx_.p.q, block, ctx_.d, q_, q_t_, x_.spoilt_q);
    pack_block(ctx_.p.dout, block, ctx_.d_v, dout_, dout_t_, x_.spoilt_dout);
  }

  void take_turn(const RowBlock& block) {
    ctx_.wait_for_turn(block);
    if (ctx_.is_first(block))
      std::memset(ctx_.dq_row(block.row0), 0,
                  sizeof(float) * row_tiles(block.rows) * kTileSide * ctx_.d_pad);
  }

  static int subs(int rows) { return (rows + kBlockRows - 1) / kBlockRows; }
  static int sub_rows(int rows, int sub) {
    const int rest = rows - sub * kBlockRows;
    return rest < kBlockRows ? rest : kBlockRows;
  }
  // Of the block of keys that begins at key `first` of the chunk.
  int block_keys(int first) const {
    return ctx_.keys - first < kBwdBlockKeys ? ctx_.keys - first : kBwdBlockKeys;
  }

  // What each 32 rows see of a block of keys.
  void find_columns(const RowBlock& block, int first) {
    for (int sub = 0; sub < subs(block.rows); ++sub)
      columns_[sub] = ctx_.map.columns(block.row0 + sub * kBlockRows, sub_rows(block.rows, sub),
                                       ctx_.key + first, block_keys(first));
  }

  // f(unit) for what the block's rows see of the keys; buffers for two units in turns.
  template <class F>
  void for_units(int rows, F f) const {
    int index = 0;
    for (int sub = 0; sub < subs(rows); ++sub) {
      const TileColumns& t = columns_[sub];
      for (int begin = t.begin, end; begin < t.end; begin = end) {
        end = (begin / kUnitKeys + 1) * kUnitKeys;
        end = end < t.end ? end : t.end;
        float* s = x_.units + index++ % 2 * 2 * kBlockRows * kUnitKeys;
        Unit unit{sub, sub_rows(rows, sub), begin, end, s, s + kBlockRows * kUnitKeys, false};
        unit.plain = is_plain(unit);
        f(unit);
      }
    }
  }
  // Of the block of keys.
  TileColumns columns(const Unit& unit) const {
    return {0, unit.end - unit.begin, columns_[unit.sub].first_key + unit.begin};
  }

  // P and dS of the block.
  void weigh_block(const RowBlock& block) {
    Unit done{};
    for_units(block.rows, [&](const Unit& unit) {
      score(unit, done, block.row0);
      done = unit;
    });
    if (done.begin < done.end) weigh_pairs(done, block.row0, 0, kBlockRows / 2);
  }

  bool is_plain(const Unit& unit) const {
    if (ctx_.modifiers || ctx_.dropout.enabled || any_far_ || unit.rows < kBlockRows) return false;
    const Row* rows = x_.rows + unit.sub * kBlockRows;
    const int first_key = columns_[unit.sub].first_key;
    return all_see(rows[0], rows[kBlockRows - 1], first_key + unit.begin, first_key + unit.end);
  }

  // c = a b^T of a unit.
  TileProduct unit_product(const Unit& unit, Packed a, Packed b, float* c) const {
    a.data = a.tile(0, unit.sub * 2, 0);
    b.data = b.tile(0, (columns_[unit.sub].first_key - ctx_.key + unit.begin) / kTileSide, 0);
    return row_major_product(a, b, c, kUnitKeys);
  }

  // S and dP of `unit`, and the rows of `done` between the tile products.
  void score(const Unit& unit, const Unit& done, int row0) {
    const int m_tiles = row_tiles(unit.rows), n_tiles = (unit.end - unit.begin) / kTileSide;
    const TileProduct s = unit_product(unit, q_, k_t_, unit.s),
                      dp = unit_product(unit, dout_, v_t_, unit.dp);
    const int steps = multiply_steps<Inputs>(s, m_tiles, 0, n_tiles) +
                      multiply_steps<Inputs>(dp, m_tiles, 0, n_tiles);
    const int pairs = done.begin < done.end ? kBlockRows / 2 : 0;
    const int each = (pairs + steps - 1) / steps;
    int pair = 0;
    const auto between = [&, each, pairs] {
      if (pair == pairs) return;
      const int end = pair + each < pairs ? pair + each : pairs;
      weigh_pairs(done, row0, pair, end);
      pair = end;
    };
    multiply<Tile, Inputs>(s, m_tiles, 0, n_tiles, between);
    multiply<Tile, Inputs>(dp, m_tiles, 0, n_tiles, between);
  }

  // Where two rows of P and dS go.
  struct PairOutput {
    uint32_t *p, *ds_pairs;
    uint16_t* ds;  // the second row 32 elements on
  };
  PairOutput pair_output(const Unit& unit, int pair) const {
    const uint32_t row = unit.sub * kBlockRows + 2 * pair, column = unit.begin;
    return {pairs_element(p_pairs_, 0, row, column), pairs_element(ds_pairs_, 0, row, column),
            reinterpret_cast<uint16_t*>(ds_.tile(0, row / kTileSide, column / kTileDepth) +
                                        row % kTileSide * 16)};
  }
  // 16 columns, from column j on, a multiple of 16.
  FLASH_INLINE void store_pair(const PairOutput& out, int j, Vec p_even, Vec p_odd, Vec ds_even,
                               Vec ds_odd) const {
    constexpr int64_t kColumn = kRows / kTileDepth * kTileWords;
    split<kTerms, true>(p_even, p_odd, [&](int t, VecU16 even, VecU16 odd) {
      store_pairs(out.p + t * p_pairs_.term_words + j / kTileSide * kColumn, pairs(even, odd));
    });
    split<kTerms, false>(ds_even, ds_odd, [&](int t, VecU16 even, VecU16 odd) {
      store_pairs(out.ds_pairs + t * ds_pairs_.term_words + j / kTileSide * kColumn,
                  pairs(even, odd));
      uint16_t* ds =
          out.ds + 2 * (t * ds_.term_words + j / kTileDepth * kTileWords) + j % kTileDepth;
      store_u16(ds, even);
      store_u16(ds + kTileDepth, odd);
    });
  }

  // P and dS of pairs of rows [pair, end) of a unit, packed; rows beyond the last are 0.
  [[gnu::noinline]] void weigh_pairs(const Unit& unit, int row0, int pair, int end) {
    for (; pair < end; ++pair) {
      if (!unit.plain)
        weigh_modified(unit, row0, pair);
      else if (unit.end - unit.begin == kUnitKeys)
        weigh_plain<kUnitKeys>(unit, pair);
      else
        weigh_plain<kTileDepth>(unit, pair);
    }
  }
  template <int kColumns>
  FLASH_INLINE void weigh_plain(const Unit& unit, int pair) const {
    const float* s = unit.s + 2 * pair * kUnitKeys;
    const float* dp = unit.dp + 2 * pair * kUnitKeys;
    const int row = unit.sub * kBlockRows + 2 * pair;
    const Vec factor = set1(ctx_.score_scale * kLog2e);
    const Vec lse[2] = {set1(x_.lse[row]), set1(x_.lse[row + 1])};
    const Vec delta[2] = {set1(x_.delta[row]), set1(x_.delta[row + 1])};
    const PairOutput out = pair_output(unit, pair);
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; j += kWidth) {
      Vec p[2], ds[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        p[i] = exp2_for(Terms{}, fma(load(s + i * kUnitKeys + j), factor, lse[i]));
        ds[i] = p[i] * (load(dp + i * kUnitKeys + j) - delta[i]);
      }
      store_pair(out, j, p[0], p[1], ds[0], ds[1]);
    }
  }
  [[gnu::noinline]] void weigh_modified(const Unit& unit, int row0, int pair) {
    float* s = unit.s + 2 * pair * kUnitKeys;
    float* dp = unit.dp + 2 * pair * kUnitKeys;
    const int columns = unit.end - unit.begin;
    for (int i = 0; i < 2; ++i) {
      const int r = 2 * pair + i;
      if (r < unit.rows) {
        weigh_row(unit, row0, r, s + i * kUnitKeys, dp + i * kUnitKeys);
      } else {
        std::memset(s + i * kUnitKeys, 0, sizeof(float) * columns);
        std::memset(dp + i * kUnitKeys, 0, sizeof(float) * columns);
      }
    }
    const PairOutput out = pair_output(unit, pair);
    for (int j = 0; j < columns; j += kWidth)
      store_pair(out, j, load(s + j), load(s + kUnitKeys + j), load(dp + j),
                 load(dp + kUnitKeys + j));
  }

  void weigh_row(const Unit& unit, int row0, int r, float* s, float* dp) {
    const int block_row = unit.sub * kBlockRows + r;
    const Row& row = x_.rows[block_row];
    const TileColumns t = columns(unit);
    if (ctx_.dropout.enabled) ctx_.random_bytes(row, t, x_.random);
    ctx_.softmax_bwd_step<kTerms == 1>(row0 + block_row, row, s, dp, t, x_.row);
    const KeyRange seen = visible(row, t);
    fill_invisible(s, t, seen, 0.f);
    fill_invisible(dp, t, seen, 0.f);
  }

  // The pair that holds an element of P or dS.
  FLASH_INLINE static uint32_t* pairs_element(const Packed& b, int term, uint32_t row,
                                              uint32_t column) {
    uint32_t* tile = b.tile(term, column / kTileSide, row / kTileDepth);
    return tile + row % kTileDepth / 2 * kTileSide + column % kTileSide;
  }
  static float sum_of_terms(const Packed& b, int row, int column) {
    float sum = 0.f;
    for (int t = kTerms - 1; t >= 0; --t)
      sum += load_scalar(pairs_element(b, t, row, column), Dtype::kBFloat16, row % 2);
    return sum;
  }

  // dV^T += dO^T P and dK^T += Q^T dS for each 32 keys, over the rows that see them.
  void accumulate_transposed(const RowBlock& block, int first) {
    const int n_tiles = ctx_.tile.keys / kTileSide;
    for (int column = 0; column < block_keys(first); column += kTileDepth) {
      int begin = 0, end = subs(block.rows);
      const auto sees = [&](int sub) {
        return columns_[sub].begin <= column && column < columns_[sub].end;
      };
      while (begin < end && !sees(begin)) ++begin;
      while (end > begin && !sees(end - 1)) --end;
      if (begin == end) continue;
      const auto add = [&](const Packed& a, const Packed& b, float* c, int d_pad) {
        TileProduct x = tiled_product(a, b, c + first / kTileSide * kTileWords, n_tiles);
        x.k_begin = begin;
        x.k_end = end;
        const int n = column / kTileSide;
        multiply<Tile, Terms>(x, d_pad / kTileSide, n, n + 2);
      };
      add(dout_t_, p_pairs_, x_.dv, ctx_.d_v_pad);
      add(q_t_, ds_pairs_, x_.dk, ctx_.d_pad);
    }
    for (int r = 0; r < block.rows; ++r) {
      const int row = block.row0 + r;
      if (x_.spoilt_dout[r])
        add_spoilt_row(r, first, ctx_.map.tensor_row(ctx_.p.dout, row), p_pairs_, x_.dv, ctx_.d_v);
      if (x_.spoilt_q[r])
        add_spoilt_row(r, first, ctx_.map.tensor_row(ctx_.p.q, row), ds_pairs_, x_.dk, ctx_.d);
    }
  }

  // What the zeros in place of inf and NaN of a row left out, for keys that it sees; c begins at
  // the chunk, the block of keys at `first`.
  void add_spoilt_row(int r, int first, const char* row, const Packed& weights, float* c, int d) {
    const KeyRange seen = visible(x_.rows[r], columns_[r / kBlockRows]);
    for (int j = seen.begin; j < seen.end; ++j)
      for (int i = 0; i < d; i += kTileSide) {
        const int n = (first + j) / kTileSide, n_tiles = ctx_.tile.keys / kTileSide;
        float* column = c + (int64_t{i / kTileSide} * n_tiles + n) * kTileWords + j % kTileSide;
        add_not_finite(column, kTileSide, sum_of_terms(weights, r, j), ctx_.p.dtype,
                       row + i * dtype_bytes(ctx_.p.dtype), d - i < kTileSide ? d - i : kTileSide);
      }
  }

  void add_dq_block(const RowBlock& block, int first) {
    for (int sub = 0; sub < subs(block.rows); ++sub) {
      const TileColumns& t = columns_[sub];
      if (t.begin == t.end) continue;
      Packed a = ds_, b = k_;
      a.data = a.tile(0, sub * 2, 0);
      b.data = b.tile(0, 0, first / kTileDepth);
      float* c = ctx_.dq_row(block.row0 + sub * kBlockRows);
      TileProduct x = row_major_product(a, b, c, ctx_.d_pad);
      x.k_begin = t.begin / kTileDepth;
      x.k_end = t.end / kTileDepth;
      x.add = true;
      const int rows = sub_rows(block.rows, sub);
      multiply<Tile, Terms>(x, row_tiles(rows), 0, ctx_.d_pad / kTileSide);
      if (!k_finite_) add_spoilt_keys(sub, rows, first, c);
    }
  }

  void add_spoilt_keys(int sub, int rows, int first, float* dq) {
    const auto k_rows = ctx_.key_rows(ctx_.p.k, ctx_.key);
    for (int r = 0; r < rows; ++r) {
      const int row = sub * kBlockRows + r;
      const KeyRange seen = visible(x_.rows[row], columns_[sub]);
      for (int j = seen.begin; j < seen.end; ++j)
        if (x_.spoilt_k[first + j])
          add_not_finite(dq + int64_t{r} * ctx_.d_pad, 1, sum_of_terms(ds_pairs_, row, j),
                         ctx_.p.dtype, k_rows(first + j), ctx_.d);
    }
  }

  // A gradient of the chunk's keys, collected as tiles of its transpose.
  void store_transposed(const float* tiles, const Operand& gradient, int d, float scale) {
    const int n_tiles = ctx_.tile.keys / kTileSide, ld = x_.staging.ld;
    for (int n = 0; n * kTileSide < ctx_.keys; ++n) {
      for (int m = 0; m * kTileSide < d; ++m)
        transpose_tile(
            x_.staging.pairs + m * kTileSide, ld,
            reinterpret_cast<const uint32_t*>(tiles) + (int64_t{m} * n_tiles + n) * kTileWords,
            kTileSide);
      for (int j = 0; j < kTileSide && n * kTileSide + j < ctx_.keys; ++j)
        ctx_.write_gradient(gradient, n * kTileSide + j,
                            reinterpret_cast<const float*>(x_.staging.pairs) + int64_t{j} * ld, d,
                            scale);
    }
  }

  const BwdContext ctx_;
  const Scratch& x_;
  const Packed q_, dout_, q_t_, dout_t_, k_t_, v_t_, k_, p_pairs_, ds_pairs_, ds_;
  TileColumns columns_[kRows / kBlockRows];  // of the block of keys, for each 32 rows
  bool any_far_ = false;                     // of the block of rows
  bool k_finite_ = true;
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
