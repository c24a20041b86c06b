// Backward attention in products of bf16 pairs: tile registers (AMX), or vectors (AVX-512-BF16).
// The tasks of bwd_run.h, as bwd.h does them in FMAs.
//
// For a block of rows and a block of the chunk's keys, both up to 256 with one term, and each 32
// keys of it:
//
//   S = Q K^T, dP = dO V^T    units of 32 rows in L1; P and dS of one unit are made while the tile
//                             unit computes the next (bwd_weights.h)
//   dV^T += dO^T P            sums over the rows: P and dS as pairs of rows
//   dK^T += Q^T dS
//
// and then, for all of them:
//
//   dQ   += dS K              sums over the keys: dS as it lies
//
// dK and dV are transposed until the chunk is complete: P and dS then need no transposition. Sums
// lie in groups of 2 x 2 tiles, each in tile registers for up to 256 rows or keys while the next
// comes into L1.
//
// softmax_scale enters after the products: Q is packed as it is, since a scaled bf16 number is not
// one. P is made of score_scale times a product, or of a score that has been multiplied before its
// modifiers (softmax_bwd_step); dK and dQ are multiplied as they are written. (bwd.h scales Q.)
//
// Where an operand is not finite, or so large that products overflow, S and dP that came out as inf
// or NaN are made again (mend_products.h). What inf and NaN of operands and, of several terms, of P
// and dS add to gradients is left out of the tile products and added to the sums.
#pragma once

#include "cpu/bwd_modified.h"
#include "cpu/bwd_tiles_sums.h"

namespace flash::cpu::FLASH_ATTN_ISA {

template <class Tile, class Terms>
class BwdTilesRunner {
 public:
  using Scratch = BwdTilesScratch;
  using Inputs = typename Terms::Inputs;
  static constexpr int kTerms = Terms::kTerms;
  static constexpr int kRows = bwd_block_rows(kTerms);

  static BwdTile tile(const Flash_bwd_params& p) { return bwd_tile(p, kTerms); }
  static Scratch carve(Carver& c, const Flash_bwd_params& p, const BwdTile& tile) {
    return carve_bwd_tiles(c, p, tile, kTerms);
  }

  BwdTilesRunner(const Flash_bwd_params& p, const BwdHead& head, int chunk, const BwdTile& tile,
                 const Scratch& x, const FarRows& far_rows, const DqSlot& dq)
      : ctx_(p, head, chunk, tile, far_rows, dq, p.scale_softmax),
        x_(x),
        sums_(ctx_, x),
        q_(packed_grid(x.q, kRows, ctx_.d_pad)),
        dout_(packed_grid(x.dout, kRows, ctx_.d_v_pad)),
        q_t_(packed_grid(x.q_t, ctx_.d_pad, kRows)),
        dout_t_(packed_grid(x.dout_t, ctx_.d_v_pad, kRows)),
        k_t_(packed_grid(x.k_t, tile.keys, ctx_.d_pad)),
        v_t_(packed_grid(x.v_t, tile.keys, ctx_.d_v_pad)) {}

  void run() {
    Tile::configure();
    pack_chunk();
    std::memset(x_.begun, 0, ctx_.tile.keys / kUnitKeys);
    ctx_.for_blocks([&](const RowBlock& block) { attend(block); });
    for (int column = 0; column * kUnitKeys < ctx_.keys; ++column)
      if (!x_.begun[column]) sums_.clear(column);
    sums_.store_transposed(x_.dk, ctx_.p.dk, ctx_.d, ctx_.p.scale_softmax);
    sums_.store_transposed(x_.dv, ctx_.p.dv, ctx_.d_v, 1.f);
    Tile::release();
  }

  // Adds the scores of a block of rows over the chunk to the rows' states.
  void add_scores(const RowBlock& block, RowState* states) {
    Tile::configure();
    pack_chunk();
    for (int r = 0; r < block.rows; ++r) x_.rows[r] = ctx_.map.row(block.row0 + r);
    pack_block(ctx_.p.q, block, ctx_.d, q_, q_t_, x_.spoilt_q);
    for (int key = 0; key < ctx_.keys; key += kUnitKeys) {
      if (key % kBwdBlockKeys == 0) find_columns(block, key);
      const KeyRange seeing = subs_that_see(block, key % kBwdBlockKeys);
      for (int sub = seeing.begin; sub < seeing.end; ++sub) {
        const Unit unit = make_unit(block, sub, key);
        Nothing nothing;
        multiply_scores(unit, q_, k_t_, unit.s, nothing);
        mend(unit, ctx_.p.q, ctx_.p.k, ctx_.d, unit.s);
        for (int r = 0; r < unit.rows; ++r)
          ctx_.add_row(unit.row[r], unit.s + r * kUnitKeys, {0, kUnitKeys, unit.first_key},
                       states[sub * kBlockRows + r]);
      }
    }
    Tile::release();
  }

 private:
  using Unit = BwdUnit<kTerms>;
  using Output = WeightsOutput<kTerms>;
  static constexpr int kDepth = kRows / kTileDepth;             // of dV^T and dK^T
  static constexpr int kKeyDepth = kBwdBlockKeys / kTileDepth;  // of dQ

  struct Nothing {
    using StreamsA = void;
    FLASH_INLINE void operator()() const {}
  };
  // Calls of between() for each tile along a sum.
  static constexpr int kCalls = requires(const TileProduct& x, Nothing& f) {
    Tile::template multiply_block<Terms, 2>(x, 0, 0, f);
  } ? 1 : 4;
  static constexpr int kGroupCalls = 4 * Terms::kProducts * kDepth;
  static constexpr int kGroupLines = kGroupCalls < 64 ? 64 / kGroupCalls : 1;

  void pack_chunk() {
    const Flash_bwd_params& p = ctx_.p;
    const auto k_rows = ctx_.key_rows(p.k, ctx_.key), v_rows = ctx_.key_rows(p.v, ctx_.key);
    k_finite_ = v_finite_ = true;
    for (int i = 0; i < ctx_.keys; i += kTileDepth) {
      const RowGroup v_group{p.dtype, i, kTileDepth, ctx_.keys, ctx_.d_v};
      v_finite_ &= stage_rows<kTerms>(x_.staging, v_group, v_rows, nullptr);
      pack_key_columns<kTerms>(v_t_, i, x_.staging);
      const RowGroup k_group{p.dtype, i, kTileDepth, ctx_.keys, ctx_.d};
      const bool finite = stage_rows<kTerms>(x_.staging, k_group, k_rows, nullptr);
      pack_key_columns<kTerms>(k_t_, i, x_.staging);
      std::memset(x_.spoilt_k + i, 0, kTileDepth);
      if (!finite) stage_rows<kTerms>(x_.staging, k_group, k_rows, x_.spoilt_k + i);
      pack_pairs<kTerms, kHalf>(k_block(i), i % kBwdBlockKeys / kTileDepth, ctx_.d_pad, x_.staging);
      k_finite_ &= finite;
    }
  }
  // K of the block of keys that holds key i of the chunk, as B of dQ.
  Packed k_block(int i) const {
    const int64_t words = packed_words(kBwdBlockKeys, ctx_.d_pad, 1);
    const int blocks = round_up(ctx_.tile.keys, kBwdBlockKeys) / kBwdBlockKeys;
    return {x_.k + i / kBwdBlockKeys * words, blocks * words, kKeyDepth};
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
      pack_transpose<kTerms, kHalf>(transposed, i / kTileDepth, round_up(d, kTileDepth),
                                    x_.staging);
      all_finite &= finite;
    }
    return all_finite;
  }

  void attend(const RowBlock& block) {
    load_rows(block);
    bool waiting = true;
    for (int first = 0; first < ctx_.keys; first += kBwdBlockKeys) {
      find_columns(block, first);
      for (int column = 0; column < block_keys(first); column += kUnitKeys) {
        prefetch_rows(block.index - 1, first + column);
        attend_column(block, first + column, subs_that_see(block, column));
      }
      if (waiting) take_turn(block);
      waiting = false;
      add_dq_block(block, first);
    }
    for (int sub = 0; sub < subs(block.rows); ++sub)
      if (!dq_begun_[sub])
        std::memset(ctx_.dq_row(block.row0 + sub * kBlockRows), 0,
                    sizeof(float) * kBlockRows * ctx_.d_pad);
    ctx_.end_turn(block, [&](int row) { return sums_.dq_row(block, row - block.row0); });
  }

  // The part of the rows of block `index` that comes into L2 while 32 keys of the chunk are
  // attended to.
  void prefetch_rows(int index, int key) const {
    if (index < 0) return;
    const int columns = (ctx_.keys + kUnitKeys - 1) / kUnitKeys;
    const int each = (kRows + columns - 1) / columns;
    const int first = index * kRows + key / kUnitKeys * each, end = (index + 1) * kRows;
    for (int row = first; row < first + each && row < end; ++row) {
      prefetch_row<2>(ctx_.p.dtype, ctx_.map.tensor_row(ctx_.p.q, row), ctx_.d);
      prefetch_row<2>(ctx_.p.dtype, ctx_.map.tensor_row(ctx_.p.dout, row), ctx_.d_v);
    }
  }
  void load_rows(const RowBlock& block) {
    any_far_ = false;
    bool weights_finite = true;  // P and dS of finite products
    const bool natural = is_modified() && ModifiedPairs<Terms, 0>::kNatural;
    for (int& key : random_key_) key = -1;
    for (int r = 0; r < block.rows; ++r) {
      x_.rows[r] = ctx_.map.row(block.row0 + r);
      const float lse = ctx_.lse(block.row0 + r), delta = ctx_.delta(x_.rows[r]);
      any_far_ |= is_far(lse);
      weights_finite &= is_finite(delta) && lse > -kInf;
      x_.lse[r] = plain_nan(natural ? -lse : -lse * kLog2e);
      x_.lse[kRows + r] = plain_nan(delta);
    }
    for (int r = block.rows; r < round_up(block.rows, kBlockRows); ++r) {
      x_.rows[r] = Row{};
      x_.lse[r] = -kInf;
      x_.lse[kRows + r] = 0.f;
    }
    finite_ = pack_block(ctx_.p.q, block, ctx_.d, q_, q_t_, x_.spoilt_q);
    finite_ &= pack_block(ctx_.p.dout, block, ctx_.d_v, dout_, dout_t_, x_.spoilt_dout);
    mends_ = !(finite_ && k_finite_ && v_finite_ && weights_finite);
  }

  void take_turn(const RowBlock& block) {
    ctx_.wait_for_turn(block);
    for (bool& begun : dq_begun_) begun = !ctx_.is_first(block);
  }

  static int subs(int rows) { return (rows + kBlockRows - 1) / kBlockRows; }
  // Of the block of keys that begins at key `first` of the chunk.
  int block_keys(int first) const {
    return ctx_.keys - first < kBwdBlockKeys ? ctx_.keys - first : kBwdBlockKeys;
  }

  // What each 32 rows see of a block of keys.
  void find_columns(const RowBlock& block, int first) {
    for (int sub = 0; sub < subs(block.rows); ++sub)
      columns_[sub] = ctx_.map.columns(block.row0 + sub * kBlockRows, rows_of_sub(block.rows, sub),
                                       ctx_.key + first, block_keys(first));
  }
  // Those [begin, end) that see any of 32 keys of it.
  KeyRange subs_that_see(const RowBlock& block, int column) const {
    const auto sees = [&](int sub) {
      return columns_[sub].begin <= column && column < columns_[sub].end;
    };
    int begin = 0, end = subs(block.rows);
    while (begin < end && !sees(begin)) ++begin;
    while (end > begin && !sees(end - 1)) --end;
    return {begin, end};
  }

  bool is_modified() const { return ctx_.modifiers || ctx_.dropout.enabled; }
  Unit make_unit(const RowBlock& block, int sub, int key) const {
    Unit unit{};
    unit.row0 = block.row0 + sub * kBlockRows;
    unit.rows = rows_of_sub(block.rows, sub);
    unit.sub = sub;
    unit.key = key;
    unit.first_key = ctx_.key + key;
    unit.s = x_.units + sub % 2 * 2 * kUnitScores;
    unit.lse = x_.lse + sub * kBlockRows;
    unit.row = x_.rows + sub * kBlockRows;
    const int column = key % kBwdBlockKeys / kTileDepth;
    unit.out = {x_.pairs + sub * kTileWords,
                x_.ds + 2 * sub * Output::kDsRows + column * kTileWords};
    unit.all_see = unit.rows == kBlockRows && all_see(unit.row[0], unit.row[unit.rows - 1],
                                                      unit.first_key, unit.first_key + kUnitKeys);
    if (is_modified() || any_far_)
      unit.weighing =
          any_far_ || !takes_keys(ctx_, unit.first_key) ? Weighing::kRowByRow : Weighing::kModified;
    else
      unit.weighing = unit.all_see ? Weighing::kPlain : Weighing::kMasked;
    return unit;
  }

  // P and dS of the block for 32 keys of the chunk, and what they add to dV and dK.
  void attend_column(const RowBlock& block, int key, const KeyRange& seeing) {
    if (seeing.begin == seeing.end) return;
    Unit done = make_unit(block, seeing.begin, key);
    Nothing nothing;
    multiply_unit(done, nothing);
    if (mends_) mend(done);
    for (int sub = seeing.begin + 1; sub < seeing.end; ++sub) {
      const Unit unit = make_unit(block, sub, key);
      beside_rows(done, unit_calls(),
                  [&](auto& rows) __attribute__((always_inline)) { multiply_unit(unit, rows); });
      if (mends_) mend(unit);
      done = unit;
    }
    const bool weights_finite = add_dv_and_dk(done, seeing);
    if (!finite_ || !weights_finite) sums_.add_spoilt_rows(block, key, !weights_finite);
  }

  // Products that came out as inf or NaN.
  void mend(const Unit& unit) const {
    mend(unit, ctx_.p.q, ctx_.p.k, ctx_.d, unit.s);
    mend(unit, ctx_.p.dout, ctx_.p.v, ctx_.d_v, unit.s + kUnitScores);
  }
  void mend(const Unit& unit, const Operand& a, const Operand& b, int d, float* products) const {
    const int padded = round_up(d, kTileN);
    const auto read = [&](int r) {
      read_row(ctx_.p.dtype, x_.row, ctx_.map.tensor_row(a, unit.row0 + r), d, padded);
    };
    mend_products(products, unit.row, unit.rows, unit.first_key,
                  {x_.row, x_.staging.buffer, ctx_.p.dtype, d, padded}, read,
                  ctx_.key_rows(b, unit.first_key));
  }

  // c = a b^T of a unit.
  template <class Between>
  FLASH_INLINE void multiply_scores(const Unit& unit, const Packed& a, const Packed& b, float* c,
                                    Between& between) const {
    Packed rows = a, keys = b;
    rows.data = a.tile(0, unit.sub * 2, 0);
    keys.data = b.tile(0, unit.key / kTileSide, 0);
    multiply_tiles<Tile, Inputs, 2>(row_major_product(rows, keys, c, kUnitKeys), 0, 0, between);
  }
  // S and dP.
  template <class Between>
  FLASH_INLINE void multiply_unit(const Unit& unit, Between& between) const {
    multiply_scores(unit, q_, k_t_, unit.s, between);
    multiply_scores(unit, dout_, v_t_, unit.s + kUnitScores, between);
  }
  int unit_calls() const {
    return 4 * Inputs::kProducts * (ctx_.d_pad + ctx_.d_v_pad) / kTileDepth;
  }

  // f(between) with P and dS of a unit spread over the first `calls` calls of between().
  template <class F>
  FLASH_INLINE void beside_rows(const Unit& unit, int calls, F f) {
    const float factor = ctx_.score_scale * kLog2e;
    if (unit.weighing == Weighing::kPlain) {
      SpreadPairs<Terms, Weighing::kPlain> rows(unit, factor, calls);
      f(rows);
    } else if (unit.weighing == Weighing::kMasked) {
      SpreadPairs<Terms, Weighing::kMasked> rows(unit, factor, calls);
      f(rows);
    } else if (unit.weighing == Weighing::kModified) {
      // Of the loops of one modification only those of the hardware are worth their code.
      if constexpr (Tile::kIsSoftware)
        beside_modified<0>(unit, calls, f);
      else
        with_modification([&]<unsigned kKnown>() __attribute__((always_inline)) {
          beside_modified<kKnown>(unit, calls, f);
        });
    } else {
      const auto weigh = [&](int i) { weigh_row_by_row(unit, i); };
      SpreadRows rows{&weigh, calls};
      f(rows);
    }
  }
  // f for the call's modification where it is the only one, or for 0.
  template <class F>
  FLASH_INLINE void with_modification(F f) const {
    switch (modifications(ctx_.p)) {
      case 1:
        return f.template operator()<1>();
      case 2:
        return f.template operator()<2>();
      case 4:
        return f.template operator()<4>();
      case 8:
        return f.template operator()<8>();
      default:
        return f.template operator()<0>();
    }
  }
  template <unsigned kKnown, class F>
  FLASH_INLINE void beside_modified(const Unit& unit, int calls, F f) {
    const uint8_t* random = x_.random + unit.sub * kBlockRows * kBwdRandomKeys;
    ModifiedPairs<Terms, kKnown> pairs(ctx_, unit, random + unit.key % kBwdRandomKeys,
                                       kBwdRandomKeys);
    const auto weigh = [&](int i) {
      if ((kKnown == 0 || kKnown == 8) && lacks_random(unit)) draw_random(unit, i);
      pairs.weigh();
    };
    SpreadRows rows{&weigh, calls};
    f(rows);
  }
  // weigh(i) for rows i and i + 16 of a unit, spread over the first `calls` calls.
  template <class F>
  struct SpreadRows {
    using StreamsA = void;
    F* weigh;  // so that it can be assigned
    int calls, due = 0, row = 0;
    FLASH_INLINE void operator()() {
      for (due += kHalf; due >= calls && row < kHalf; due -= calls) (*weigh)(row++);
    }
  };

  static int random_key(const Unit& unit) { return unit.key / kBwdRandomKeys * kBwdRandomKeys; }
  FLASH_INLINE bool lacks_random(const Unit& unit) const {
    return ctx_.dropout.enabled && random_key_[unit.sub] != random_key(unit);
  }
  // Dropout's bytes of rows i and i + 16 of a unit, for its keys and their neighbours. The first
  // unit of these keys draws them.
  [[gnu::noinline]] void draw_random(const Unit& unit, int i) {
    const int key = random_key(unit);
    for (int r = i; r < unit.rows; r += kHalf)
      ctx_.random_bytes_of(r, unit.row, unit.rows, {0, kBwdRandomKeys, ctx_.key + key},
                           x_.random + unit.sub * kBlockRows * kBwdRandomKeys, kBwdRandomKeys);
    if (i == kHalf - 1) random_key_[unit.sub] = key;
  }

  // Rows i and i + 16 of a unit; rows beyond the last are 0.
  [[gnu::noinline]] void weigh_row_by_row(const Unit& unit, int i) {
    if (lacks_random(unit)) draw_random(unit, i);
    const uint8_t* random =
        x_.random + (unit.sub * kBlockRows + i) * kBwdRandomKeys + unit.key % kBwdRandomKeys;
    Vec p[2][2], ds[2][2];
    for (int half = 0; half < 2; ++half) {
      const int r = i + half * kHalf;
      float* s = unit.s + r * kUnitKeys;
      float* dp = s + kUnitScores;
      if (r < unit.rows) {
        const TileColumns t{0, kUnitKeys, unit.first_key};
        ctx_.template softmax_bwd_step<kTerms == 1>(
            unit.row0 + r, unit.row[r], s, dp, t,
            {x_.cap_slope, random + half * kHalf * kBwdRandomKeys});
        const KeyRange seen = visible(unit.row[r], t);
        fill_invisible(s, t, seen, 0.f);
        fill_invisible(dp, t, seen, 0.f);
      }
      for (int j = 0; j < 2; ++j) {
        p[half][j] = r < unit.rows ? plain_nan(load(s + j * kHalf)) : zero();
        ds[half][j] = r < unit.rows ? plain_nan(load(dp + j * kHalf)) : zero();
      }
    }
    unit.out.row(i).store(p, ds);
  }

  // dV^T += dO^T P and dK^T += Q^T dS over the rows that see 32 keys, the rows of the last unit
  // beside the first product. False if inf and NaN of P and dS are left out.
  bool add_dv_and_dk(const Unit& last, const KeyRange& seeing) {
    const int column = last.key / kUnitKeys, others = seeing.end - seeing.begin - 1;
    Packed p{x_.pairs, Output::kPairsTerm, kDepth};
    Packed ds{x_.pairs + Output::ds_pairs(), Output::kPairsTerm, kDepth};
    bool left_out = false;
    float *dv = sums_.dv(column), *dk = sums_.dk(column);
    const bool add = x_.begun[column];
    x_.begun[column] = true;
    const bool rows_first = others == 0 || (kTerms > 1 && mends_);
    beside_rows(last, rows_first ? 1 : kCalls * others,
                [&](auto& rows) __attribute__((always_inline)) {
                  if (rows_first) rows();
                  if (kTerms > 1 && mends_ && sums_.copy_finite_pairs()) {
                    left_out = true;
                    p.data = x_.finite;
                    ds.data = x_.finite + Output::ds_pairs();
                  }
                  add_group(dout_t_, p, 0, seeing, dv, add, rows);
                });
    add_groups(dout_t_, p, 2, ctx_.d_v_pad, seeing, dv, add, dk);
    add_groups(q_t_, ds, 0, ctx_.d_pad, seeing, dk, add, dv + kUnitKeys * ctx_.d_v_pad);
    return !left_out;
  }
  // Rows of tiles [m, d / 16) of c = or += a b; `next` is what follows.
  void add_groups(const Packed& a, const Packed& b, int m, int d, const KeyRange& k, float* c,
                  bool add, const float* next) const {
    for (; m < d / kTileSide; m += 2) {
      float* group = c + m / 2 * kSumGroup;
      PrefetchTiles<kGroupLines> prefetch{m + 2 < d / kTileSide ? group + kSumGroup : next};
      add_group(a, b, m, k, group, add, prefetch);
    }
  }
  // Rows of tiles m, m + 1 of a, both columns of b.
  template <class Between>
  FLASH_INLINE static void add_group(const Packed& a, const Packed& b, int m, const KeyRange& k,
                                     float* c, bool add, Between& between) {
    const Packed rows{a.tile(0, m, 0), a.term_words, b.depth_tiles};
    const TileProduct x{rows, b, k.begin, k.end, c, 2 * kTileWords, kTileWords, kTileSide, add};
    multiply_tiles<Tile, Terms, 2>(x, 0, 0, between);
  }

  // dQ += dS K of a block of rows and a block of keys.
  void add_dq_block(const RowBlock& block, int first) {
    const Packed k = k_block(first);
    const bool left_out = kTerms > 1 && mends_ && sums_.copy_finite_ds();
    uint32_t* const weights = left_out ? x_.finite : x_.ds;
    for (int sub = 0; sub < subs(block.rows); ++sub) {
      const TileColumns& t = columns_[sub];
      if (t.begin == t.end) continue;
      const Packed ds{weights + 2 * sub * Output::kDsRows, Output::kDsTerm, kKeyDepth};
      const KeyRange keys{t.begin / kTileDepth, t.end / kTileDepth};
      float* c = ctx_.dq_row(block.row0 + sub * kBlockRows);
      const bool add = dq_begun_[sub];
      dq_begun_[sub] = true;
      for (int n = 0; n < ctx_.d_pad / kTileSide; n += 2, c += kSumGroup) {
        const Packed columns{k.tile(0, n, 0), k.term_words, kKeyDepth};
        if (ctx_.d_pad <= 64) {  // K of the block stays in L1
          PrefetchTiles<kGroupLines, true> prefetch{c + kSumGroup};
          add_group(ds, columns, 0, keys, c, add, prefetch);
        } else {
          PrefetchTiles<kGroupLines, false> prefetch{c + kSumGroup};
          add_group(ds, columns, 0, keys, c, add, prefetch);
        }
      }
      if (!k_finite_ || left_out) sums_.add_spoilt_keys(block, sub, first, t, left_out);
    }
  }

  const BwdContext ctx_;
  const Scratch& x_;
  const BwdTilesSums<kTerms> sums_;
  const Packed q_, dout_, q_t_, dout_t_, k_t_, v_t_;
  TileColumns columns_[kRows / kBlockRows];  // of the block of keys, for each 32 rows
  int random_key_[kRows / kBlockRows];       // of the chunk, whose random bytes are there
  bool dq_begun_[kRows / kBlockRows];        // for each 32 rows: dq holds sums
  bool any_far_ = false;                     // of the block of rows
  bool finite_ = true;                       // its q and dout
  bool k_finite_ = true, v_finite_ = true;   // of the chunk
  bool mends_ = false;                       // products or weights of the block may not be finite
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
