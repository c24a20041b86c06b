// Forward attention in products of bf16 pairs: tile registers (AMX), or vectors (AVX-512-BF16). The
// tasks of fwd_run.h, as fwd.h does them in FMAs; those of few rows are streamed as everywhere
// (decode.h).
//
// A task packs a chunk of keys, as much of K and V as leaves room in L2, and walks over it with
// blocks of 32 rows, in units of 32 keys; a few units are a piece. One step of a pipeline that runs
// on from block to block:
//
//   tile unit      S = Q K^T of a unit, and a part (some columns) of O += P V of the last piece
//                  whose weights P are complete
//   vector units   P of the unit before, a few rows after each tile product (fwd_weights.h)
//
// S of two units lies in L1, and P of two pieces.
//
// The reference of a row's exponents is set by the first unit that it sees and raised only when a
// score exceeds it by 2^7 to 2^8: O is almost never rescaled, and P needs no maximum before it.
// That a weight was too large is seen when it is made; the piece is then made again (weigh_again),
// with higher references, from sums as they were before it. By then the pieces before it are in O.
// One FMA scales a score and subtracts the reference, which costs the weights a relative error of
// 2^-24 of it; where it is large, it is subtracted first. Row sums stay one vector a row until the
// end. A score that is NaN makes its weight NaN, which counts as too large: so scores that terms
// have wrong are found without a look at them (mend_products.h).
//
// softmax_scale enters with that FMA: Q is packed as it is, and S holds products. Modifiers want
// scores: products are then multiplied by it before them (finish_products), and so where it is not
// positive, since the largest product would not be the largest score. (fwd.h scales Q.)
//
// All grids of keys start at multiples of their size, so that a row's arithmetic does not depend on
// the task it falls into.
#pragma once

#include <type_traits>

#include "cpu/fwd_references.h"
#include "cpu/mend_products.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// Head dims in tiles of 32, known to the compiler; AnyDims: not.
template <int D, int Dv>
struct FixedDims {
  static constexpr int kD = D, kDv = Dv;
};
using AnyDims = FixedDims<0, 0>;

template <class Tile, class Terms, class Dims>
class FwdTilesRunner {
 public:
  using Scratch = FwdTilesScratch;
  using Inputs = typename Terms::Inputs;
  static constexpr int kTerms = Terms::kTerms;
  static constexpr int kPieceUnits = Dims::kDv == 2 ? 2 : 4;
  static constexpr int kPieceKeys = kPieceUnits * kUnitKeys;
  static constexpr int kPairs =  // of tile columns of O multiplied beside a unit
      Dims::kDv > kPieceUnits ? Dims::kDv / kPieceUnits : 1;
  static constexpr int64_t kWeightsTerm =  // words from one term of P to the next
      packed_words(kBlockRows, 2 * kPieceKeys, 1);

  static FwdTile tile(const Flash_fwd_params& p) { return fwd_tile(p, kTerms, kPieceKeys); }
  static Scratch carve(Carver& c, const Flash_fwd_params& p, const FwdTile& tile) {
    return carve_fwd_tiles(c, p, tile, kTerms, kPieceKeys);
  }

  FwdTilesRunner(const Flash_fwd_params& p, const FwdTask& task, const FwdTile& tile,
                 const Scratch& x)
      : ctx_(p, task.batch, task.head_k),
        task_(task),
        tile_(tile),
        x_(x),
        scale_(p.scale_softmax * ctx_.factors.of_scores()),
        factors_differ_(ctx_.factors.q.differ() || ctx_.factors.k.differ()),
        fold_scale_(!ctx_.modifiers && !factors_differ_ && scale_ > 0.f),
        // Three terms would show that the FMA rounds otherwise than the modifiers did.
        references_(ctx_, x, fold_scale_ ? scale_ : 1.f, fold_scale_ || kTerms < 3),
        factor_(references_.factor()),
        q_(packed_grid(x.packed_q, tile.task_rows, ctx_.d_pad)),
        k_(packed_grid(x.packed_k, tile.keys, ctx_.d_pad)),
        v_(packed_grid(x.packed_v, ctx_.d_v_pad, tile.keys)),
        weights_(packed_grid(x.packed_p, kBlockRows, 2 * kPieceKeys)) {}

  void run() {
    Tile::configure();
    load_q();
    const int padded_rows = round_up(rows(), kBlockRows);
    std::memset(x_.o, 0, sizeof(float) * padded_rows * ctx_.d_v_pad);
    std::memset(x_.sums, 0, sizeof(float) * padded_rows * kWidth);
    std::memset(x_.packed_p, 0, 4 * packed_words(kBlockRows, 2 * kPieceKeys, kTerms));
    const int first = task_.key_begin / kPieceKeys * kPieceKeys;
    const int end = task_.key_begin < task_.key_end ? task_.key_end : first;
    for (int key = first, next; key < end; key = next) {
      next = (key / tile_.keys + 1) * tile_.keys;
      next = next < end ? next : end;
      pack_kv(key, next - key);
      for (int row = 0; row < rows(); row += kBlockRows) attend(row, key, next - key);
      while (weighed_.rows > 0 || multiplied_.rows > 0) advance(Unit{});
    }
    for (int r = 0; r < rows(); ++r) x_.state[r].sum = reduce_add(load(sums(r, block(r).sums)));
    scale_o(ctx_.factors.v.shared());
    Tile::release();
  }

 private:
  using BlockState = FwdTilesScratch::BlockState;

  // A block of rows over 32 keys.
  struct Unit {
    int row = 0, rows = 0;  // of the task; no rows: no unit
    int begin = 0;          // its first column of the chunk
    int piece_begin = 0;    // the first column of its piece that any of the rows sees
    int first_key = 0;      // of the chunk
    bool ends_piece = false;
    bool plain = false;  // products are scores, and every row sees every column
    float* scores = nullptr;
    uint16_t* weights = nullptr;  // of its piece, the first term

    int end() const { return begin + kUnitKeys; }
    int key() const { return first_key + begin; }
  };
  // Weights on their way into O.
  struct Piece {
    int row = 0, rows = 0;   // no rows: none
    int begin = 0, end = 0;  // columns of the chunk
    int first_key = 0;
    int steps = 0, pairs = 0;  // steps that have multiplied parts; pairs of tile columns done
    uint16_t* weights = nullptr;
  };

  int rows() const { return task_.row_end - task_.row_begin; }
  BlockState& block(int row) const { return x_.block(row); }
  float* sums(int row, int which) const { return x_.sums_of(row, which); }

  void scale_o(float factor) {
    for (int r = 0; r < rows(); ++r)
      multiply_output(x_.o + int64_t{r} * ctx_.d_v_pad, factor, x_.state[r].sum, ctx_.d_v_pad);
  }

  // Queries as A, rotated, not scaled, and fresh softmax states.
  void load_q() {
    for (int r = 0; r < rows(); ++r) {
      x_.rows[r] = ctx_.map.row(task_.row_begin + r);
      x_.state[r] = RowState{};
      x_.reference[r] = kNoReference;
      x_.largest[r] = -kInf;
      x_.shift[r] = 0.f;
      block(r) = {true, false, 0};
    }
    const auto q_row = [&](int r) -> const void* {
      return ctx_.map.tensor_row(ctx_.p.q, task_.row_begin + r);
    };
    for (int r = 0; r < round_up(rows(), kBlockRows); ++r) {
      if (ctx_.p.rotary_dim > 0 && r < rows())
        stage_rotated(r);
      else
        stage_rows<kTerms>(x_.staging, {ctx_.p.dtype, r, 1, rows(), ctx_.d}, q_row, nullptr);
      copy_staged_row<kTerms>(q_, r, x_.staging, 0);
    }
  }

  void stage_rotated(int r) {
    float* q = x_.buffer;
    read_query(ctx_.p, ctx_.seq, ctx_.map, task_.row_begin + r, q, ctx_.d_pad);
    stage_floats<kTerms>(x_.staging, 0, q, ctx_.d_pad);
  }

  void pack_kv(int key, int keys) {
    const auto k_rows = ctx_.key_rows(ctx_.p.k, key), v_rows = ctx_.key_rows(ctx_.p.v, key);
    v_finite_ = true;
    for (int i = 0; i < keys; i += kTileDepth) {
      const RowGroup k_group{ctx_.p.kv_dtype, i, kTileDepth, keys, ctx_.d};
      stage_rows<kTerms>(x_.staging, k_group, k_rows, nullptr);
      pack_key_columns<kTerms>(k_, i, x_.staging);
      const RowGroup v_group{ctx_.p.kv_dtype, i, kTileDepth, keys, ctx_.d_v};
      v_finite_ &= stage_rows<kTerms>(x_.staging, v_group, v_rows, x_.spoilt + i);
      pack_pairs<kTerms>(v_, i / kTileDepth, ctx_.d_v_pad, x_.staging);
    }
  }

  // The units of a block of rows over a chunk of keys.
  void attend(int row, int key, int keys) {
    const int count = rows() - row < kBlockRows ? rows() - row : kBlockRows;
    const TileColumns t = ctx_.map.columns(task_.row_begin + row, count, key, keys);
    Unit unit;
    unit.row = row;
    unit.rows = count;
    unit.first_key = key;
    for (unit.begin = t.begin; unit.begin < t.end; unit.begin += kUnitKeys) {
      const int piece = unit.begin / kPieceKeys * kPieceKeys;
      unit.piece_begin = piece > t.begin ? piece : t.begin;
      unit.ends_piece = unit.end() == t.end || unit.end() % kPieceKeys == 0;
      unit.plain = is_plain(unit);
      if (unit.begin == unit.piece_begin) slot_ ^= 1;
      unit.weights = reinterpret_cast<uint16_t*>(weights_.tile(0, 0, slot_ * kPieceUnits));
      unit.scores = weighed_.scores == x_.units ? x_.units + kUnitScores : x_.units;
      advance(unit);
    }
  }

  bool sees_all(const Unit& unit) const {
    return all_see(x_.rows[unit.row], x_.rows[unit.row + unit.rows - 1], unit.key(),
                   unit.key() + kUnitKeys);
  }
  bool is_plain(const Unit& unit) const { return fold_scale_ && sees_all(unit); }

  void advance(const Unit& unit) {
    const Unit done = weighed_;
    const Piece piece = multiplied_;
    const int pairs = next_pairs(done);
    bool exceeds = false;
    const auto go = [&](auto modifier, float factor) {
      RowWeigher<Terms, decltype(modifier)> rows(weight_rows(done, done.scores, factor), modifier);
      // Of the modifiers' loops only those of the usual head dims are worth their code.
      using Modifier = decltype(modifier);
      constexpr bool kFixed =
          std::is_same_v<Modifier, NoModifier> ||
          (Dims::kD <= 4 && !Tile::kIsSoftware && !std::is_same_v<Modifier, ValueFactors>);
      if (kFixed && fits_fixed(unit, done, pairs))
        exceeds = step_fixed(unit, pairs, rows);
      else
        exceeds = step(unit, pairs, rows);
    };
    if (done.rows > 0 && ctx_.factors.v.differ()) {
      prepare(done);
      with_value_factors(done, [&](ValueFactors x) { go(x, factor_); });
    } else if (ctx_.modifiers && done.rows > 0 && modifies_exponents(done)) {
      with_modifier(done, go);
    } else {
      if (done.rows > 0) prepare(done);
      go(NoModifier{}, factor_);
    }
    if (pairs > 0 && piece.pairs == 0 && !v_finite_) add_spoilt_values(piece);
    multiplied_.pairs = pairs;
    if (pairs * kTileDepth == ctx_.d_v_pad) multiplied_.rows = 0;
    if (done.rows > 0) finish_unit(done, exceeds);
    weighed_ = unit;
  }

  // Whether the weights of a unit's rows can be made of products: there is a modifier for them.
  bool modifies_exponents(const Unit& unit) const {
    const BlockState& state = block(unit.row);
    const Flash_fwd_params& p = ctx_.p;
    const int modifiers = (p.softcap > 0.f) + (p.alibi_slopes != nullptr) + (p.bias.ptr != nullptr);
    return modifiers == 1 && !state.unset && !state.far && !factors_differ_ && scale_ > 0.f &&
           (!p.bias.ptr || p.bias.col_stride == 1) && sees_all(unit);
  }
  template <class F>
  FLASH_INLINE void with_modifier(const Unit& unit, F f) const {
    const Flash_fwd_params& p = ctx_.p;
    const Row* rows = x_.rows + unit.row;
    const float factor = scale_ * kLog2e;
    if (p.softcap > 0.f)
      return f(SoftcapModifier<Terms>{scale_ / p.softcap, p.softcap * kLog2e}, factor);
    if (p.alibi_slopes)
      return f(AlibiModifier{rows, unit.key() + ctx_.seq.seqlen_q - ctx_.seq.seqlen_k}, factor);
    with_dtype(p.bias.dtype, [&]<Dtype T>() {
      f(BiasModifier<T>{rows, int64_t{unit.key()} * dtype_bytes(T)}, factor);
    });
  }

  template <class F>
  FLASH_INLINE void with_value_factors(const Unit& unit, F f) const {
    alignas(64) float factors[kUnitKeys];
    fill_unit_factors(unit, factors, [&](int64_t j) { return ctx_.factors.of_v(j); });
    f(ValueFactors{{}, factors});
  }

  // The pairs of tile columns of O that are complete after the next step: all when another piece
  // is.
  int next_pairs(const Unit& done) {
    Piece& piece = multiplied_;
    if (piece.rows == 0) return 0;
    const int all = ctx_.d_v_pad / kTileDepth;
    ++piece.steps;
    return done.rows == 0 || done.ends_piece ? all : all * piece.steps / kPieceUnits;
  }
  // Whether a step is of whole blocks and pieces, in an even flow.
  bool fits_fixed(const Unit& unit, const Unit& done, int pairs) const {
    if (Dims::kD == 0 || unit.rows < kBlockRows || done.rows < kBlockRows) return false;
    const Piece& piece = multiplied_;
    if (pairs == piece.pairs) return true;
    return pairs - piece.pairs == kPairs && piece.rows == kBlockRows &&
           piece.end - piece.begin == kPieceKeys;
  }

  WeightRows weight_rows(const Unit& unit, const float* scores, float factor) const {
    if (unit.rows == 0) return {};
    const int which = block(unit.row).sums;
    float* after = sums(unit.row, which ^ 1);
    return {.rows = unit.rows,
            .scores = scores,
            .reference = x_.reference + unit.row,
            .before = unit.begin == unit.piece_begin ? sums(unit.row, which) : after,
            .after = after,
            .weights = weight(unit.weights, 0, unit.begin),
            .next_tile = 2 * kTileWords * (2 * kPieceUnits - 1) + 2 * kTileSide,
            .next_term = 2 * kWeightsTerm,
            .factor = factor};
  }

  // A step of any shape. True if weights exceed.
  template <class Rows>
  bool step(const Unit& unit, int pairs, Rows& rows) {
    TileProduct s{}, o{};
    const int m_tiles = row_tiles(unit.rows), o_m_tiles = row_tiles(multiplied_.rows);
    const int n_begin = 2 * multiplied_.pairs, n_end = 2 * pairs;
    int steps = 0;
    if (unit.rows > 0) {
      s = scores_product(unit, unit.scores);
      steps += multiply_steps<Inputs>(s, m_tiles, 0, 2);
    }
    if (n_begin < n_end) {
      o = values_product(multiplied_);
      steps += multiply_steps<Terms>(o, o_m_tiles, n_begin, n_end);
    }
    RowsBetween<Rows> between(rows, steps);
    if (unit.rows > 0) multiply<Tile, Inputs>(s, m_tiles, 0, 2, between);
    if (n_begin < n_end) multiply<Tile, Terms>(o, o_m_tiles, n_begin, n_end, between);
    rows = between.rows();
    rows.finish();
    return rows.exceeds();
  }

  // The same of whole blocks and pieces; the compiler knows all but the addresses.
  template <class Rows>
  FLASH_INLINE bool step_fixed(const Unit& unit, int pairs, Rows& rows) {
    if constexpr (Dims::kD > 0) {
      constexpr int kBesideScores = kBlockRows * Dims::kD / (Dims::kD + kPairs * kPieceUnits);
      constexpr int kBesideValues = (kBlockRows - kBesideScores) / kPairs;
      const uint32_t *q = q_.tile(0, unit.row / kTileSide, 0),
                     *k = k_.tile(0, unit.begin / kTileSide, 0);
      using Scores = FixedProduct<Tile, Dims::kD>;
      Scores::zero();
      if (multiplied_.pairs == pairs) {
        Scores::template run<kBlockRows>(q, Dims::kD, k, Dims::kD, unit.scores, kUnitKeys, rows);
      } else {
        Scores::template run<kBesideScores>(q, Dims::kD, k, Dims::kD, unit.scores, kUnitKeys, rows);
        using Values = FixedProduct<Tile, kPieceUnits>;
        constexpr int kLd = Dims::kDv * kTileDepth;
        const auto* p = reinterpret_cast<const uint32_t*>(multiplied_.weights);
        const uint32_t* v = v_.tile(0, 0, multiplied_.begin / kTileDepth);
        float* o = x_.o + int64_t{multiplied_.row} * kLd;
        for (int pair = multiplied_.pairs; pair < pairs; ++pair) {
          Values::load(o + pair * kTileDepth, kLd);
          Values::template run<kBesideValues>(p, 2 * kPieceUnits,
                                              v + int64_t{2 * pair} * v_.depth_tiles * kTileWords,
                                              v_.depth_tiles, o + pair * kTileDepth, kLd, rows);
        }
      }
      rows.finish();
    }
    return rows.exceeds();
  }

  TileProduct scores_product(const Unit& unit, float* scores) const {
    Packed q = q_, k = k_;
    q.data = q_.tile(0, unit.row / kTileSide, 0);
    k.data = k_.tile(0, unit.begin / kTileSide, 0);
    return row_major_product(q, k, scores, kUnitKeys);
  }
  TileProduct values_product(const Piece& piece) const {
    TileProduct x =
        row_major_product(weights_, v_, x_.o + int64_t{piece.row} * ctx_.d_v_pad, ctx_.d_v_pad);
    const int first = piece.begin / kPieceKeys * kPieceKeys;
    x.a.data = reinterpret_cast<uint32_t*>(piece.weights);
    x.b.data = v_.tile(0, 0, first / kTileDepth);
    x.k_begin = (piece.begin - first) / kTileDepth;
    x.k_end = (piece.end - first) / kTileDepth;
    x.add = true;
    return x;
  }

  // Weight of row r, column j of a piece, a multiple of 32.
  static uint16_t* weight(uint16_t* piece, int r, int j) {
    const int tile = r / kTileSide * 2 * kPieceUnits + j % kPieceKeys / kTileDepth;
    return piece + 2 * (tile * kTileWords + r % kTileSide * kTileSide);
  }

  // After S: what the weights are made of.
  FLASH_INLINE void prepare(const Unit& unit) {
    const BlockState& state = block(unit.row);
    if (unit.plain && !state.unset && !state.far) return;
    prepare_rows(unit);
  }
  [[gnu::noinline]] void prepare_rows(const Unit& unit) {
    BlockState& state = block(unit.row);
    if (!unit.plain) finish_products(unit, unit.scores);
    if (state.unset) {
      state.unset = false;
      for (int r = 0; r < unit.rows; ++r)
        if (x_.largest[unit.row + r] == -kInf) set_first_reference(unit, r);
    }
    if (state.far) shift_scores(unit, unit.scores);
  }
  void set_first_reference(const Unit& unit, int r) {
    const float largest = largest_score(unit.scores + r * kUnitKeys);
    if (largest > -kInf)
      references_.set(unit.row + r, largest + references_.growth(unit.row + r, unit.key()));
    else
      block(unit.row).unset = true;
  }
  static float largest_score(const float* s) { return reduce_max(max(load(s), load(s + kWidth))); }

  // Products become scores.
  void finish_products(const Unit& unit, float* scores) {
    const Row* rows = x_.rows + unit.row;
    if (factors_differ_) multiply_factors(unit, scores);
    if (!fold_scale_)
      modify_rows<kUnitKeys>(ctx_.p, ctx_.map, rows, unit.rows, scores, kUnitKeys, unit.key(),
                             scale_);
    if (sees_all(unit)) return;
    const TileColumns t{0, kUnitKeys, unit.key()};
    for (int r = 0; r < unit.rows; ++r)
      fill_invisible(scores + r * kUnitKeys, t, visible(rows[r], t), -kInf);
  }
  void multiply_factors(const Unit& unit, float* scores) const {
    const HeadFactors& x = ctx_.factors;
    alignas(64) float factors[kUnitKeys], of_row[kUnitKeys];
    fill_unit_factors(unit, factors, [&](int64_t j) { return x.k.differ() ? x.of_k(j) : 1.f; });
    for (int r = 0; r < unit.rows; ++r) {
      const float of_q = x.q.differ() ? x.q.of(x_.rows[unit.row + r].query) : 1.f;
      for (int j = 0; j < kUnitKeys; j += kWidth) store(of_row + j, load(factors + j) * of_q);
      multiply_columns(scores + r * kUnitKeys, of_row, kUnitKeys);
    }
  }
  template <class Factor>
  void fill_unit_factors(const Unit& unit, float* factors, Factor factor) const {
    fill_factors(factors, unit.key(), ctx_.map.seqlen_k() - unit.key(), kUnitKeys, factor);
  }
  void shift_scores(const Unit& unit, float* scores) const {
    for (int r = 0; r < unit.rows; ++r) {
      const float shift = x_.shift[unit.row + r];
      float* s = scores + r * kUnitKeys;
      if (shift == 0.f) continue;
      for (int j = 0; j < kUnitKeys; j += kWidth) store(s + j, load(s + j) - set1(shift));
    }
  }

  // After P.
  FLASH_INLINE void finish_unit(const Unit& unit, bool exceeds) {
    exceeds_ |= exceeds;
    if (ctx_.dropout.enabled) drop(unit);
    if (!unit.ends_piece) return;
    if (exceeds_) weigh_again(unit);
    exceeds_ = false;
    block(unit.row).sums ^= 1;
    multiplied_ = {.row = unit.row,
                   .rows = unit.rows,
                   .begin = unit.piece_begin,
                   .end = unit.end(),
                   .first_key = unit.first_key,
                   .weights = unit.weights};
  }

  void drop(const Unit& unit) {
    const int first_key = unit.key() / kRandomKeys * kRandomKeys;
    if (random_row_ != unit.row || random_key_ != first_key)
      ctx_.random_bytes(x_.rows + unit.row, unit.rows, {0, kRandomKeys, first_key}, x_.random,
                        kRandomRow);
    random_row_ = unit.row;
    random_key_ = first_key;
    for (int r = 0; r < unit.rows; ++r) {
      uint16_t* weights = weight(unit.weights, r, unit.begin);
      const VecU16x2 keep =
          kept_u16(ctx_.dropout, x_.random + r * kRandomRow + unit.key() % kRandomKeys);
      for (int i = 0; i < kTerms; ++i) {
        uint16_t* p = weights + i * 2 * kWeightsTerm;
        store_u16x2(p, load_u16x2(p) & keep);
      }
    }
  }

  void mend(const Unit& unit, float* scores) const {
    const auto read = [&](int r) {
      read_query(ctx_.p, ctx_.seq, ctx_.map, task_.row_begin + unit.row + r, x_.buffer, ctx_.d_pad);
    };
    mend_products(scores, x_.rows + unit.row, unit.rows, unit.key(),
                  {x_.buffer, x_.staging.buffer, ctx_.p.kv_dtype, ctx_.d, ctx_.d_pad}, read,
                  ctx_.key_rows(ctx_.p.k, unit.key()));
  }

  // The weights of the piece that ends with `last`, some of which were too large or NaN.
  [[gnu::noinline]] void weigh_again(const Unit& last) {
    Unit unit = last;
    const auto for_units = [&](auto f) {
      float* scores = x_.again;
      for (unit.begin = last.piece_begin; unit.begin < last.end(); unit.begin += kUnitKeys) {
        f(scores);
        scores += kUnitScores;
      }
    };
    for_units([&](float* scores) {
      multiply<Tile, Inputs>(scores_product(unit, scores), row_tiles(unit.rows), 0, 2);
      mend(unit, scores);
      if (!is_plain(unit)) finish_products(unit, scores);
    });
    for (int r = 0; r < last.rows; ++r) {
      float largest = -kInf;
      for_units([&](float* scores) {
        const float s = largest_score(scores + r * kUnitKeys);
        largest = s > largest ? s : largest;
      });
      references_.raise(last.row + r, largest,
                        references_.growth(last.row + r, last.first_key + last.piece_begin));
    }
    for_units([&](float* scores) {
      if (block(unit.row).far) shift_scores(unit, scores);
      const WeightRows rows = weight_rows(unit, scores, factor_);
      if (ctx_.factors.v.differ())
        with_value_factors(
            unit, [&](ValueFactors x) { RowWeigher<Terms, ValueFactors>(rows, x).finish(); });
      else
        RowWeigher<Terms>(rows).finish();
      if (ctx_.dropout.enabled) drop(unit);
    });
  }

  // What the zeros in place of inf and NaN left out, in rows that see them.
  void add_spoilt_values(const Piece& piece) {
    const auto v_rows = ctx_.key_rows(ctx_.p.v, piece.first_key);
    for (int j = piece.begin; j < piece.end; ++j) {
      const int key = piece.first_key + j;
      if (key >= task_.key_end || !x_.spoilt[j]) continue;
      for (int r = 0; r < piece.rows; ++r) {
        const KeyRange seen = x_.rows[piece.row + r].keys;
        if (key < seen.begin || key >= seen.end) continue;
        const uint16_t* weights = weight(piece.weights, r, j / kTileDepth * kTileDepth);
        float p = 0.f;
        for (int i = 0; i < kTerms; ++i)
          p += load_scalar(weights + i * 2 * kWeightsTerm, Dtype::kBFloat16, j % kTileDepth);
        add_not_finite(x_.o + int64_t{piece.row + r} * ctx_.d_v_pad, 1, p, ctx_.p.kv_dtype,
                       v_rows(j), ctx_.d_v);
      }
    }
  }

  const TaskContext<Flash_fwd_params> ctx_;
  const FwdTask& task_;
  const FwdTile& tile_;
  const Scratch& x_;
  const float scale_;          // of products, with q's and k's factors if these do not differ
  const bool factors_differ_;  // from one row of q or k to the next
  const bool fold_scale_;      // products are scores but for the scale
  const FwdReferences references_;
  const float factor_;  // from products (or scores, where modified) to units of log2
  const Packed q_, k_, v_, weights_;
  bool v_finite_ = true;
  Unit weighed_;                           // whose P comes next
  Piece multiplied_;                       // whose product with V is not complete
  bool exceeds_ = false;                   // the piece that is being made holds too large weights
  int slot_ = 0;                           // of packed_p, of that piece
  int random_row_ = -1, random_key_ = -1;  // of the block and keys whose random bytes there are
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
