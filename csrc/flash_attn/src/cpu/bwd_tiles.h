// Backward attention on tile registers of bf16 (AMX): bwd.h's tasks with other products.
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
#pragma once

#include "cpu/bwd.h"
#include "cpu/fwd_tiles.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr int kBwdBlockKeys = 256;

struct BwdTilesScratch : BwdScratch {  // of BwdScratch: buffer, cap_slope, rows, random
  uint32_t *q, *dout;                  // [tile.rows] x [d], [dv]: A of S and dP
  uint32_t *q_t, *dout_t;              // their transposes: A of dK^T and dV^T
  uint32_t *k_t, *v_t, *k;             // the chunk: B of S, dP and dQ
  uint32_t *p_pairs, *ds_pairs, *ds;   // [tile.rows] x [kBwdBlockKeys]
  float *dk, *dv;                      // [d], [dv] x [keys], fp32 tiles
  float* units;                        // two of S and dP, [32][kUnitKeys] each
  float *lse, *delta;                  // [tile.rows]: what to add to exponents, to take from dP
  uint8_t *spoilt_q, *spoilt_dout, *spoilt_k;
  Staging staging;
};

template <class Tile, class Terms>
class BwdTilesRunner : public BwdTaskRunner {
 public:
  using Scratch = BwdTilesScratch;
  static constexpr int kTerms = Terms::kTerms;
  static constexpr int kRows = 256 / kTerms / kBlockRows * kBlockRows;

  static BwdTile tile(const Flash_bwd_params& p) {
    const int d = round_up(static_cast<int>(p.d), kTileDepth),
              dv = round_up(static_cast<int>(p.d_v), kTileDepth);
    const int keys = (1 << 20) / (2 * kTerms * (2 * d + dv) + 4 * (d + dv)) / kUnitKeys * kUnitKeys;
    return {kRows, keys < kUnitKeys ? kUnitKeys : keys > 512 ? 512 : keys};
  }

  static Scratch carve(Carver& c, const Flash_bwd_params& p, const BwdTile& tile) {
    const int64_t d = round_up(static_cast<int>(p.d), kTileDepth),
                  dv = round_up(static_cast<int>(p.d_v), kTileDepth);
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
    x.staging = carve_staging(c, kTerms, static_cast<int>(d > dv ? d : dv));
    x.buffer = c.take<float>(kUnitKeys + kWidth);
    x.cap_slope = c.take<float>(kUnitKeys);
    x.rows = c.take<Row>(kRows);
    x.random = c.take<uint8_t>(kUnitKeys + 64);
    x.spoilt_q = c.take<uint8_t>(kRows);
    x.spoilt_dout = c.take<uint8_t>(kRows);
    x.spoilt_k = c.take<uint8_t>(tile.keys);
    return x;
  }

  BwdTilesRunner(const Flash_bwd_params& p, const BwdHead& head, int chunk, const BwdTile& tile,
                 const Scratch& x, const FarRows& far_rows, float* dq_sums = nullptr,
                 int* turns = nullptr)
      : BwdTaskRunner(p, head, chunk, tile, x, far_rows, dq_sums, turns),
        x_(x),
        q_(packed_grid(x.q, kRows, d_pad_)),
        dout_(packed_grid(x.dout, kRows, d_v_pad_)),
        q_t_(packed_grid(x.q_t, d_pad_, kRows)),
        dout_t_(packed_grid(x.dout_t, d_v_pad_, kRows)),
        k_t_(packed_grid(x.k_t, tile.keys, d_pad_)),
        v_t_(packed_grid(x.v_t, tile.keys, d_v_pad_)),
        k_(packed_grid(x.k, d_pad_, tile.keys)),
        p_pairs_(packed_grid(x.p_pairs, kBwdBlockKeys, kRows)),
        ds_pairs_(packed_grid(x.ds_pairs, kBwdBlockKeys, kRows)),
        ds_(packed_grid(x.ds, kRows, kBwdBlockKeys)) {
    score_scale_ = p.scale_softmax;
  }

  void run() {
    Tile::configure();
    pack_chunk();
    std::memset(x_.dk, 0, sizeof(float) * tile_.keys * d_pad_);
    std::memset(x_.dv, 0, sizeof(float) * tile_.keys * d_v_pad_);
    for (int block = (map_.rows() + kRows - 1) / kRows - 1; block >= 0; --block) attend(block);
    store_transposed(x_.dk, p_.dk, d_, p_.scale_softmax);
    store_transposed(x_.dv, p_.dv, d_v_, 1.f);
    Tile::release();
  }

  void add_scores(int row0, int rows, RowState* states) {
    Tile::configure();
    pack_chunk();
    for (int r = 0; r < rows; ++r) x_.rows[r] = map_.row(row0 + r);
    pack_block(p_.q, row0, rows, d_, q_, q_t_, x_.spoilt_q);
    for (int first = 0; first < keys_; first += kBwdBlockKeys) {
      find_columns(row0, rows, first,
                   keys_ - first < kBwdBlockKeys ? keys_ - first : kBwdBlockKeys);
      for_units(rows, [&](const Unit& unit) {
        const TileProduct s = unit_product(unit, q_, k_t_, unit.s);
        multiply<Tile, Terms>(s, tiles(unit.rows), 0, (unit.end - unit.begin) / kTileSide);
        for (int r = unit.sub * kBlockRows; r < unit.sub * kBlockRows + unit.rows; ++r)
          add_row(x_.rows[r], unit.s + (r % kBlockRows) * kUnitKeys, columns(unit), states[r]);
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

  const char* key_row(const Operand& x, int i) const {
    return cache_row(p_, x, seq_, seq_.leftpad + key_ + i, head_.head_k);
  }

  void pack_chunk() {
    k_finite_ = true;
    for (int i = 0; i < keys_; i += kTileDepth) {
      const RowGroup v_rows{p_.dtype, i, kTileDepth, keys_, d_v_};
      stage_rows<kTerms>(x_.staging, v_rows, [&](int j) { return key_row(p_.v, j); }, nullptr);
      pack_columns<kTerms>(v_t_, i / kTileSide, x_.staging, 0);
      pack_columns<kTerms>(v_t_, i / kTileSide + 1, x_.staging, kTileSide);
      const RowGroup k_rows{p_.dtype, i, kTileDepth, keys_, d_};
      const auto k_row = [&](int j) { return key_row(p_.k, j); };
      const bool finite = stage_rows<kTerms>(x_.staging, k_rows, k_row, nullptr);
      pack_columns<kTerms>(k_t_, i / kTileSide, x_.staging, 0);
      pack_columns<kTerms>(k_t_, i / kTileSide + 1, x_.staging, kTileSide);
      std::memset(x_.spoilt_k + i, 0, kTileDepth);
      if (!finite) stage_rows<kTerms>(x_.staging, k_rows, k_row, x_.spoilt_k + i);
      pack_pairs<kTerms>(k_, i / kTileDepth, d_pad_, x_.staging);
      k_finite_ &= finite;
    }
  }

  // A tensor of rows as A, and its transpose. True if all is finite.
  bool pack_block(const Operand& tensor, int row0, int rows, int d, const Packed& natural,
                  const Packed& transposed, uint8_t* spoilt) {
    const auto row = [&](int i) -> const void* { return map_.tensor_row(tensor, row0 + i); };
    bool all_finite = true;
    for (int i = 0; i < rows; i += kTileDepth) {
      const RowGroup group{p_.dtype, i, kTileDepth, rows, d};
      const bool finite = stage_rows<kTerms>(x_.staging, group, row, nullptr);
      for (int r = 0; r < kTileDepth; ++r) copy_staged_row<kTerms>(natural, i + r, x_.staging, r);
      std::memset(spoilt + i, 0, kTileDepth);
      if (!finite) stage_rows<kTerms>(x_.staging, group, row, spoilt + i);
      pack_transpose<kTerms>(transposed, i / kTileDepth, round_up(d, kTileDepth), x_.staging);
      all_finite &= finite;
    }
    return all_finite;
  }

  void attend(int block) {
    const int row0 = block * kRows;
    const int rows = map_.rows() - row0 < kRows ? map_.rows() - row0 : kRows;
    const KeyRange seen = chunks(row0, rows);
    if (chunk_ < seen.begin || chunk_ >= seen.end) return;
    any_far_ = false;
    for (int r = 0; r < rows; ++r) {
      x_.rows[r] = map_.row(row0 + r);
      const float lse = p_.softmax_lse[map_.lse_index(row0 + r)];
      any_far_ |= is_far(lse);
      x_.lse[r] = -lse * kLog2e;
      x_.delta[r] = p_.dsoftmax_sum[dsoftmax_index(x_.rows[r])];
    }
    q_finite_ = pack_block(p_.q, row0, rows, d_, q_, q_t_, x_.spoilt_q);
    dout_finite_ = pack_block(p_.dout, row0, rows, d_v_, dout_, dout_t_, x_.spoilt_dout);
    int* turn = turns_ + block;
    bool waiting = true;
    for (int first = 0; first < keys_; first += kBwdBlockKeys) {
      const int count = keys_ - first < kBwdBlockKeys ? keys_ - first : kBwdBlockKeys;
      find_columns(row0, rows, first, count);
      weigh_block(row0, rows);
      accumulate_transposed(row0, rows, first, count);
      if (waiting) take_turn(turn, row0, rows, seen.begin);
      waiting = false;
      add_dq_block(row0, rows, first);
    }
    if (chunk_ == seen.end - 1) {
      for (int r = 0; r < rows; ++r)
        write_row(p_.dtype, map_.tensor_row(p_.dq, row0 + r),
                  dq_sums_ + (row0 + r) * int64_t{d_pad_}, d_, p_.scale_softmax);
    }
    __atomic_store_n(turn, chunk_ - seen.begin + 1, __ATOMIC_RELEASE);
  }

  void take_turn(const int* turn, int row0, int rows, int first_chunk) {
    wait_for(turn, chunk_ - first_chunk);
    if (chunk_ == first_chunk)
      std::memset(dq_sums_ + int64_t{row0} * d_pad_, 0,
                  sizeof(float) * tiles(rows) * kTileSide * d_pad_);
  }

  static int subs(int rows) { return (rows + kBlockRows - 1) / kBlockRows; }
  static int sub_rows(int rows, int sub) {
    const int rest = rows - sub * kBlockRows;
    return rest < kBlockRows ? rest : kBlockRows;
  }
  static int tiles(int rows) { return (rows + kTileSide - 1) / kTileSide; }

  // What each 32 rows see of the keys [first, first + count) of the chunk.
  void find_columns(int row0, int rows, int first, int count) {
    for (int sub = 0; sub < subs(rows); ++sub)
      columns_[sub] =
          map_.columns(row0 + sub * kBlockRows, sub_rows(rows, sub), key_ + first, count);
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
  void weigh_block(int row0, int rows) {
    Unit done{};
    for_units(rows, [&](const Unit& unit) {
      score(unit, done, row0);
      done = unit;
    });
    if (done.begin < done.end) weigh_pairs(done, row0, 0, kBlockRows / 2);
  }

  bool is_plain(const Unit& unit) const {
    if (modifiers_ || dropout_.enabled || any_far_ || unit.rows < kBlockRows) return false;
    const Row* rows = x_.rows + unit.sub * kBlockRows;
    const int first_key = columns_[unit.sub].first_key;
    return all_see(rows[0], rows[kBlockRows - 1], first_key + unit.begin, first_key + unit.end);
  }

  // c = a b^T of a unit.
  TileProduct unit_product(const Unit& unit, Packed a, Packed b, float* c) const {
    a.data = a.tile(0, unit.sub * 2, 0);
    b.data = b.tile(0, (columns_[unit.sub].first_key - key_ + unit.begin) / kTileSide, 0);
    return row_major_product(a, b, c, kUnitKeys);
  }

  // S and dP of `unit`, and the rows of `done` between the tile products.
  void score(const Unit& unit, const Unit& done, int row0) {
    const int m_tiles = tiles(unit.rows), n_tiles = (unit.end - unit.begin) / kTileSide;
    const TileProduct s = unit_product(unit, q_, k_t_, unit.s),
                      dp = unit_product(unit, dout_, v_t_, unit.dp);
    const int steps = multiply_steps<Terms>(s, m_tiles, 0, n_tiles) +
                      multiply_steps<Terms>(dp, m_tiles, 0, n_tiles);
    const int pairs = done.begin < done.end ? kBlockRows / 2 : 0;
    const int each = (pairs + steps - 1) / steps;
    int pair = 0;
    const auto between = [&, each, pairs] {
      if (pair == pairs) return;
      const int end = pair + each < pairs ? pair + each : pairs;
      weigh_pairs(done, row0, pair, end);
      pair = end;
    };
    multiply<Tile, Terms>(s, m_tiles, 0, n_tiles, between);
    multiply<Tile, Terms>(dp, m_tiles, 0, n_tiles, between);
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
    const Vec factor = set1(score_scale_ * kLog2e);
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
    softmax_bwd_step<kTerms == 1>(row0 + block_row, row, s, dp, t);
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
  void accumulate_transposed(int row0, int rows, int first, int count) {
    const int n_tiles = tile_.keys / kTileSide;
    for (int column = 0; column < count; column += kTileDepth) {
      int begin = 0, end = subs(rows);
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
      add(dout_t_, p_pairs_, x_.dv, d_v_pad_);
      add(q_t_, ds_pairs_, x_.dk, d_pad_);
    }
    for (int r = 0; r < rows; ++r) {
      if (x_.spoilt_dout[r])
        add_spoilt_row(r, first, map_.tensor_row(p_.dout, row0 + r), p_pairs_, x_.dv, d_v_);
      if (x_.spoilt_q[r])
        add_spoilt_row(r, first, map_.tensor_row(p_.q, row0 + r), ds_pairs_, x_.dk, d_);
    }
  }

  // What the zeros in place of inf and NaN of a row left out, for keys that it sees; c begins at
  // the chunk, the block of keys at `first`.
  void add_spoilt_row(int r, int first, const char* row, const Packed& weights, float* c, int d) {
    const KeyRange seen = visible(x_.rows[r], columns_[r / kBlockRows]);
    for (int j = seen.begin; j < seen.end; ++j)
      for (int i = 0; i < d; i += kTileSide) {
        const int n = (first + j) / kTileSide, n_tiles = tile_.keys / kTileSide;
        float* column = c + (int64_t{i / kTileSide} * n_tiles + n) * kTileWords + j % kTileSide;
        add_not_finite(column, kTileSide, sum_of_terms(weights, r, j), p_.dtype,
                       row + i * dtype_bytes(p_.dtype), d - i < kTileSide ? d - i : kTileSide);
      }
  }

  void add_dq_block(int row0, int rows, int first) {
    for (int sub = 0; sub < subs(rows); ++sub) {
      const TileColumns& t = columns_[sub];
      if (t.begin == t.end) continue;
      Packed a = ds_, b = k_;
      a.data = a.tile(0, sub * 2, 0);
      b.data = b.tile(0, 0, first / kTileDepth);
      float* c = dq_sums_ + int64_t{row0 + sub * kBlockRows} * d_pad_;
      TileProduct x = row_major_product(a, b, c, d_pad_);
      x.k_begin = t.begin / kTileDepth;
      x.k_end = t.end / kTileDepth;
      x.add = true;
      multiply<Tile, Terms>(x, tiles(sub_rows(rows, sub)), 0, d_pad_ / kTileSide);
      if (!k_finite_) add_spoilt_keys(sub, sub_rows(rows, sub), first, c);
    }
  }

  void add_spoilt_keys(int sub, int rows, int first, float* dq) {
    for (int r = 0; r < rows; ++r) {
      const int row = sub * kBlockRows + r;
      const KeyRange seen = visible(x_.rows[row], columns_[sub]);
      for (int j = seen.begin; j < seen.end; ++j)
        if (x_.spoilt_k[first + j])
          add_not_finite(dq + int64_t{r} * d_pad_, 1, sum_of_terms(ds_pairs_, row, j), p_.dtype,
                         key_row(p_.k, first + j), d_);
    }
  }

  // A gradient of the chunk's keys, collected as tiles of its transpose.
  void store_transposed(const float* tiles, const Operand& gradient, int d, float scale) {
    const int n_tiles = tile_.keys / kTileSide, ld = x_.staging.ld;
    for (int n = 0; n * kTileSide < keys_; ++n) {
      for (int m = 0; m * kTileSide < d; ++m)
        transpose_tile(
            x_.staging.pairs + m * kTileSide, ld,
            reinterpret_cast<const uint32_t*>(tiles) + (int64_t{m} * n_tiles + n) * kTileWords,
            kTileSide);
      for (int j = 0; j < kTileSide && n * kTileSide + j < keys_; ++j) {
        const int64_t row = seq_.k_row + seq_.leftpad + key_ + n * kTileSide + j;
        write_row(p_.dtype, operand_row(gradient, p_.dtype, seq_.k_batch, row, head_.head_k),
                  reinterpret_cast<const float*>(x_.staging.pairs) + int64_t{j} * ld, d, scale);
      }
    }
  }

  const Scratch& x_;
  const Packed q_, dout_, q_t_, dout_t_, k_t_, v_t_, k_, p_pairs_, ds_pairs_, ds_;
  TileColumns columns_[kRows / kBlockRows];  // of the block of keys, for each 32 rows
  bool any_far_ = false;                     // of the block of rows
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
