// Forward attention in products of bf16 pairs: tile registers (AMX), or vectors (AVX-512-BF16). The
// tasks of fwd_run.h, as fwd.h does them in FMAs; those of few rows are streamed as everywhere
// (decode.h).
//
// A task packs a chunk of keys, as much of K and V as leaves room in L2, and walks over it with
// blocks of 32 rows:
//
//   units of 64 keys      S = Q K^T in L1, twice: while the tile unit computes one, or a product
//                         with V, vector units make P of the other
//   pieces of 128 keys    O += P V with P as bf16; P of two pieces, so that one is made while the
//                         other is multiplied
//
// The reference of a row's exponents is raised only when a score exceeds it by 2^8: O is almost
// never rescaled, and P needs no maximum before it. One FMA scales a score and subtracts the
// reference, which costs the weights a relative error of 2^-24 of it; where it is large, or scores
// are modified, it is subtracted first. Row sums stay one vector a row until the end.
//
// softmax_scale enters with that FMA: Q is packed as it is, and S holds products. Modifiers want
// scores: products are then multiplied by it before them (weigh_modified), and so where it is not
// positive, since the largest product would not be the largest score. (fwd.h scales Q.)
//
// All grids of keys start at multiples of their size, so that a row's arithmetic does not depend on
// the task it falls into.
#pragma once

#include "cpu/decode.h"
#include "cpu/tile_units.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr int kPieceKeys = 128;
inline constexpr float kNoReference = 0x1.fffffep127f;  // any score exceeds it
inline constexpr float kMaxExponent = 8.f;              // scores beyond raise the reference
inline constexpr float kMaxFused = 1024.f;  // of references subtracted by the FMA that scales

struct FwdTilesScratch {
  float* o;  // [task_rows][dv], padded to kTileN
  uint32_t *packed_q, *packed_k, *packed_v;
  uint32_t* packed_p;  // [32] x [2 kPieceKeys]
  float* units;        // two of [32][kUnitKeys] scores
  float* lane_sum;     // [task_rows][kWidth]
  float* reference;    // [task_rows]: what to add to a scaled score; kNoReference before the first,
                       // and where `largest` must be subtracted before scaling
  float* largest;      // [task_rows]: the score that is the reference, not scaled
  float* buffer;       // a row of Q, or of bias
  RowState* state;     // [task_rows]
  Row* rows;           // [task_rows]
  uint8_t* random;     // [kUnitKeys]
  uint8_t* spoilt;     // [tile.keys]: V's rows with inf or NaN
  Staging staging;
};

template <class Tile, class Terms>
class FwdTilesRunner {
 public:
  using Scratch = FwdTilesScratch;
  static constexpr int kTerms = Terms::kTerms;
  static constexpr int64_t kWeightsTerm =  // words from one term of P to the next
      packed_words(kBlockRows, 2 * kPieceKeys, 1);

  static FwdTile tile(const Flash_fwd_params& p) {
    const HeadDims dims(p);
    const int d = dims.d_pad, dv = dims.d_v_pad;
    int keys = (512 << 10) / (2 * kTerms * (d + dv)) / kPieceKeys * kPieceKeys;
    keys = keys < kPieceKeys ? kPieceKeys : keys > 1024 ? 1024 : keys;
    int task_rows = (768 << 10) / (2 * kTerms * d + 4 * dv) / kBlockRows * kBlockRows;
    task_rows = task_rows < kBlockRows ? kBlockRows : task_rows > 1024 ? 1024 : task_rows;
    return {.rows = kBlockRows, .keys = keys, .task_rows = task_rows, .stream = stream_tile(p)};
  }

  static Scratch carve(Carver& c, const Flash_fwd_params& p, const FwdTile& tile) {
    const HeadDims dims(p);
    const int64_t d = dims.d_pad, dv = dims.d_v_pad;
    Scratch x{};
    x.o = c.take<float>(tile.task_rows * dv);
    x.packed_q = c.take<uint32_t>(packed_words(tile.task_rows, d, kTerms));
    x.packed_k = c.take<uint32_t>(packed_words(tile.keys, d, kTerms));
    x.packed_v = c.take<uint32_t>(packed_words(tile.keys, dv, kTerms));
    x.packed_p = c.take<uint32_t>(packed_words(kBlockRows, 2 * kPieceKeys, kTerms));
    x.units = c.take<float>(2 * kBlockRows * kUnitKeys);
    x.lane_sum = c.take<float>(int64_t{tile.task_rows} * kWidth);
    x.reference = c.take<float>(tile.task_rows);
    x.largest = c.take<float>(tile.task_rows);
    x.staging = carve_staging(c, kTerms, dims.largest_pad());
    x.buffer = c.take<float>(d + tile.keys + kWidth);
    x.state = c.take<RowState>(tile.task_rows);
    x.rows = c.take<Row>(tile.task_rows);
    x.random = c.take<uint8_t>(kUnitKeys + 64);
    x.spoilt = c.take<uint8_t>(tile.keys);
    return x;
  }

  FwdTilesRunner(const Flash_fwd_params& p, const FwdTask& task, const FwdTile& tile,
                 const Scratch& x)
      : ctx_(p, task.batch, task.head_k),
        task_(task),
        tile_(tile),
        x_(x),
        fold_scale_(!ctx_.modifiers && p.scale_softmax > 0.f),
        scale_(fold_scale_ ? p.scale_softmax : 1.f),
        factor_(scale_ * kLog2e),
        natural_(static_cast<double>(scale_) / factor_),
        q_(packed_grid(x.packed_q, tile.task_rows, ctx_.d_pad)),
        k_(packed_grid(x.packed_k, tile.keys, ctx_.d_pad)),
        v_(packed_grid(x.packed_v, ctx_.d_v_pad, tile.keys)),
        weights_(packed_grid(x.packed_p, kBlockRows, 2 * kPieceKeys)) {}

  void run() {
    Tile::configure();
    load_q();
    const int padded_rows = round_up(rows(), kBlockRows);
    std::memset(x_.o, 0, sizeof(float) * padded_rows * ctx_.d_v_pad);
    std::memset(x_.lane_sum, 0, sizeof(float) * padded_rows * kWidth);
    std::memset(x_.packed_p, 0, 4 * packed_words(kBlockRows, 2 * kPieceKeys, kTerms));
    const int first = task_.key_begin / kPieceKeys * kPieceKeys;
    const int end = task_.key_begin < task_.key_end ? task_.key_end : first;
    for (int key = first, next; key < end; key = next) {
      next = (key / tile_.keys + 1) * tile_.keys;
      next = next < end ? next : end;
      pack_kv(key, next - key);
      for (int row = 0; row < rows(); row += kBlockRows) attend(row, key, next - key);
    }
    for (int r = 0; r < rows(); ++r)
      x_.state[r].sum = reduce_add(load(x_.lane_sum + int64_t{r} * kWidth));
    Tile::release();
  }

 private:
  int rows() const { return task_.row_end - task_.row_begin; }

  // A block of rows over the columns [begin, end) of a chunk of keys.
  struct Unit {
    int row, rows;   // of the task
    int begin, end;  // columns of the chunk, at most kUnitKeys, multiples of 32
    int seen_begin;  // first column that any of the rows sees
    int first_key;   // of the chunk
    float* scores;   // [rows][kUnitKeys]
    bool plain;      // products are scores, and every row sees every column
    int next;        // the first row without weights
    uint32_t late;   // a bit for each row before it that waits for a higher reference
  };

  // Queries as A, rotated, not scaled, and fresh softmax states.
  void load_q() {
    for (int r = 0; r < rows(); ++r) {
      x_.rows[r] = ctx_.map.row(task_.row_begin + r);
      x_.state[r] = RowState{};
      x_.reference[r] = kNoReference;
      x_.largest[r] = -kInf;
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
      const RowGroup k_group{ctx_.p.dtype, i, kTileDepth, keys, ctx_.d};
      stage_rows<kTerms>(x_.staging, k_group, k_rows, nullptr);
      pack_key_columns<kTerms>(k_, i, x_.staging);
      const RowGroup v_group{ctx_.p.dtype, i, kTileDepth, keys, ctx_.d_v};
      v_finite_ &= stage_rows<kTerms>(x_.staging, v_group, v_rows, x_.spoilt + i);
      pack_pairs<kTerms>(v_, i / kTileDepth, ctx_.d_v_pad, x_.staging);
    }
  }

  // Scores of a unit on the tile unit, P of the unit before on the vector units, in turns; products
  // with V follow where a piece of keys ends.
  void attend(int row, int key, int keys) {
    const int count = rows() - row < kBlockRows ? rows() - row : kBlockRows;
    const TileColumns t = ctx_.map.columns(task_.row_begin + row, count, key, keys);
    Unit unit{row, 0, 0, 0, t.begin, key, x_.units, false, 0, 0};
    for (int begin = t.begin; begin < t.end;) {
      Unit done = unit;
      const int end = (begin / kUnitKeys + 1) * kUnitKeys;
      unit.rows = count;
      unit.begin = begin;
      unit.end = end < t.end ? end : t.end;
      unit.scores = done.scores == x_.units ? x_.units + kBlockRows * kUnitKeys : x_.units;
      unit.plain = is_plain(unit);
      unit.next = 0;
      score(unit, done);
      if (done.end % kPieceKeys == 0) finish_piece(done, unit);
      begin = unit.end;
    }
    weigh_rows(unit, unit.rows);
    raise_late(unit);
    finish_piece(unit, unit);
  }

  bool is_plain(const Unit& unit) const {
    return fold_scale_ && !ctx_.dropout.enabled &&
           all_see(x_.rows[unit.row], x_.rows[unit.row + unit.rows - 1],
                   unit.first_key + unit.begin, unit.first_key + unit.end);
  }

  // S of `unit`, and P of the rows of `done` between the tile products.
  void score(const Unit& unit, Unit& done) {
    const int m = unit.row / kTileSide, m_tiles = row_tiles(unit.rows), n = unit.begin / kTileSide;
    Packed q = q_, k = k_;
    q.data = q_.tile(0, m, 0);
    k.data = k_.tile(0, n, 0);
    const TileProduct x = row_major_product(q, k, unit.scores, kUnitKeys);
    const int n_tiles = (unit.end - unit.begin) / kTileSide;
    const int steps = multiply_steps<Terms>(x, m_tiles, 0, n_tiles);
    const int each = (done.rows - done.next + steps - 1) / steps;
    multiply<Tile, Terms>(x, m_tiles, 0, n_tiles, [this, &done, each] {
      if (done.next == done.rows) return;
      weigh_rows(done, each);
      raise_late(done);
    });
  }

  // O += P V of the piece that ends with the unit `done`, and P of the unit after it (or `done`
  // again) between the tile products; rows that rescale O come last.
  void finish_piece(const Unit& done, Unit& next) {
    if (done.begin == done.end) return;
    const int piece = done.begin / kPieceKeys * kPieceKeys;
    const int begin = done.seen_begin > piece ? done.seen_begin : piece;
    TileProduct x =
        row_major_product(weights_, v_, x_.o + int64_t{done.row} * ctx_.d_v_pad, ctx_.d_v_pad);
    x.a.data = weights_.tile(0, 0, piece % (2 * kPieceKeys) / kTileDepth);
    x.b.data = v_.tile(0, 0, piece / kTileDepth);
    x.k_begin = (begin - piece) / kTileDepth;
    x.k_end = (done.end - piece) / kTileDepth;
    x.add = true;
    const int m_tiles = row_tiles(done.rows), n_tiles = ctx_.d_v_pad / kTileSide;
    if (next.plain && next.next < next.rows) {
      const int steps = multiply_steps<Terms>(x, m_tiles, 0, n_tiles);
      const int each = (next.rows + steps - 1) / steps;
      multiply<Tile, Terms>(x, m_tiles, 0, n_tiles, [this, &next, each] {
        if (next.next < next.rows) weigh_rows(next, each);
      });
    } else {
      multiply<Tile, Terms>(x, m_tiles, 0, n_tiles);
    }
    if (!v_finite_) add_spoilt_values(done, begin);
    raise_late(next);
  }

  uint16_t* weight(int term, uint32_t r, uint32_t column) const {
    constexpr uint32_t kColumns = 2 * kPieceKeys, kTiles = kColumns / kTileDepth;
    const uint32_t j = column % kColumns;
    const uint32_t tile = r / kTileSide * kTiles + j / kTileDepth;
    return reinterpret_cast<uint16_t*>(x_.packed_p) + 2 * term * kWeightsTerm +
           2 * (tile * kTileWords + r % kTileSide * 16) + j % kTileDepth;
  }

  // P of the unit's next `count` rows.
  [[gnu::noinline]] void weigh_rows(Unit& unit, int count) {
    const int end = unit.next + count < unit.rows ? unit.next + count : unit.rows;
    if (!unit.plain)
      for (int r = unit.next; r < end; ++r) weigh_modified(unit, r);
    else if (unit.end - unit.begin == kUnitKeys)
      unit.late |= weigh_plain<kUnitKeys>(unit, unit.next, end);
    else
      unit.late |= weigh_plain<kTileDepth>(unit, unit.next, end);
    unit.next = end;
  }
  // P of rows [r, end) of a plain unit of kColumns. Returns a bit for each row left out because its
  // reference must be raised first.
  template <int kColumns>
  FLASH_INLINE uint32_t weigh_plain(const Unit& unit, int r, int end) {
    uint32_t late = 0;
    for (; r < end; ++r)
      if (!weigh_columns<kColumns, false>(unit, r, x_.reference[unit.row + r], kMaxExponent))
        late |= 1u << r;
    return late;
  }
  FLASH_INLINE void raise_late(Unit& unit) {
    if (unit.late) raise_rows(unit);
  }
  [[gnu::noinline]] void raise_rows(Unit& unit) {
    for (; unit.late; unit.late &= unit.late - 1) {
      const int r = __builtin_ctz(unit.late);
      raise_reference(unit, r);
      weigh_raised<false>(unit, r);
    }
  }

  // P of row r of a unit whose products are not yet its scores.
  [[gnu::noinline]] void weigh_modified(const Unit& unit, int r) {
    const Row& row = x_.rows[unit.row + r];
    float* s = unit.scores + r * kUnitKeys;
    const TileColumns t{0, unit.end - unit.begin, unit.first_key + unit.begin};
    if (!fold_scale_)
      for (int j = 0; j < t.end; j += kWidth) store(s + j, load(s + j) * ctx_.p.scale_softmax);
    ctx_.finish_scores(row, s, t, x_.buffer);
    if (ctx_.dropout.enabled) ctx_.random_bytes(row, t, x_.random);
    const float reference = x_.reference[unit.row + r];
    const bool done = ctx_.dropout.enabled ? weigh_row<true>(unit, r, reference, kMaxExponent)
                                           : weigh_row<false>(unit, r, reference, kMaxExponent);
    if (done) return;
    raise_reference(unit, r);
    ctx_.dropout.enabled ? weigh_raised<true>(unit, r) : weigh_raised<false>(unit, r);
  }

  // P of row r, whose reference none of its scores exceeds by far.
  template <bool kDropout>
  void weigh_raised(const Unit& unit, int r) {
    float reference = x_.reference[unit.row + r];
    if (reference == kNoReference) {
      float* s = unit.scores + r * kUnitKeys;
      const Vec largest = set1(x_.largest[unit.row + r]);
      for (int j = 0; j < unit.end - unit.begin; j += kWidth) store(s + j, load(s + j) - largest);
      reference = 0.f;
    }
    weigh_row<kDropout>(unit, r, reference, kInf);
  }

  template <bool kDropout>
  bool weigh_row(const Unit& unit, int r, float reference, float limit) {
    return unit.end - unit.begin == kUnitKeys
               ? weigh_columns<kUnitKeys, kDropout>(unit, r, reference, limit)
               : weigh_columns<kTileDepth, kDropout>(unit, r, reference, limit);
  }
  // P of row r of a unit of kColumns; false, and nothing done, if any exponent exceeds the limit.
  // Beside the tile unit the number of instructions is what counts.
  template <int kColumns, bool kDropout>
  FLASH_INLINE bool weigh_columns(const Unit& unit, int r, float reference, float limit) {
    constexpr int kVectors = kColumns / kWidth;
    const float* s = unit.scores + r * kUnitKeys;
    Vec x[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      x[j] = fma(load(s + j * kWidth), set1(factor_), set1(reference));
    Vec largest = x[0];
#pragma GCC unroll 4
    for (int j = 1; j < kVectors; ++j) largest = max(largest, x[j]);
    if (any_greater(largest, limit)) return false;
    float* lane_sum = x_.lane_sum + int64_t{unit.row + r} * kWidth;
    Vec sum = load(lane_sum);
    uint16_t* weights = weight(0, r, unit.begin);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      x[j] = exp2_for(Terms{}, x[j]);
      sum += x[j];
      if constexpr (kDropout)
        x[j] = select(kept(ctx_.dropout, x_.random, j * kWidth), x[j], zero());
    }
    store(lane_sum, sum);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j += 2) store_weights(weights + j * kTileWords, x[j], x[j + 1]);
    return true;
  }

  // The reference of row r in units of log2, exact.
  double exponent_of_reference(int r) const {
    if (x_.reference[r] == kNoReference) return static_cast<double>(x_.largest[r]) * factor_;
    return -x_.reference[r];
  }
  void set_reference(int r, float largest) {
    const float exponent = largest * factor_;
    const bool fused = fold_scale_ && -kMaxFused <= exponent && exponent <= kMaxFused;
    x_.reference[r] = fused ? -exponent : kNoReference;
    x_.largest[r] = largest;
    x_.state[r].max = fused ? static_cast<float>(exponent * natural_) : largest * scale_;
  }

  // If a score of row r exceeds the reference of its exponents by far, the largest becomes the
  // reference; O, the sum and the weights that wait for their product with V are scaled
  // accordingly.
  [[gnu::noinline]] void raise_reference(const Unit& unit, int r) {
    const float* s = unit.scores + r * kUnitKeys;
    Vec largest = set1(-kInf);
    for (int j = 0; j < unit.end - unit.begin; j += kWidth) largest = max(largest, load(s + j));
    const float candidate = reduce_max(largest);
    if (!((candidate - x_.largest[unit.row + r]) * factor_ > kMaxExponent)) return;
    const double before = exponent_of_reference(unit.row + r);
    set_reference(unit.row + r, candidate);
    const float scale = exp2(static_cast<float>(before - exponent_of_reference(unit.row + r)));
    float* lane_sum = x_.lane_sum + int64_t{unit.row + r} * kWidth;
    store(lane_sum, load(lane_sum) * scale);
    float* o = x_.o + int64_t{unit.row + r} * ctx_.d_v_pad;
    for (int i = 0; i < ctx_.d_v_pad; i += kWidth) store(o + i, load(o + i) * scale);
    const int piece = unit.begin / kPieceKeys * kPieceKeys;
    for (int j = unit.seen_begin > piece ? unit.seen_begin : piece; j < unit.begin;
         j += kTileDepth) {
      uint16_t* weights = weight(0, r, j);
      store_weights(weights, load_weights(weights) * scale, load_weights(weights + kWidth) * scale);
    }
  }

  FLASH_INLINE static void store_weights(uint16_t* dst, Vec low, Vec high) {
    split<kTerms, true>(low, high, [&](int i, VecU16 a, VecU16 b) {
      store_u16(dst + i * 2 * kWeightsTerm, a);
      store_u16(dst + i * 2 * kWeightsTerm + kWidth, b);
    });
  }
  static Vec load_weights(const uint16_t* src) {
    Vec p = zero();
    for (int i = kTerms - 1; i >= 0; --i) p += bf16_to_float(load_u16(src + i * 2 * kWeightsTerm));
    return p;
  }

  // What the zeros in place of inf and NaN left out, in rows that see them.
  void add_spoilt_values(const Unit& unit, int begin) {
    const auto v_rows = ctx_.key_rows(ctx_.p.v, unit.first_key);
    for (int j = begin; j < unit.end; ++j) {
      const int key = unit.first_key + j;
      if (key >= task_.key_end || !x_.spoilt[j]) continue;
      for (int r = 0; r < unit.rows; ++r) {
        const KeyRange seen = x_.rows[unit.row + r].keys;
        if (key < seen.begin || key >= seen.end) continue;
        float p = 0.f;
        for (int i = 0; i < kTerms; ++i) p += load_scalar(weight(i, r, j), Dtype::kBFloat16, 0);
        add_not_finite(x_.o + int64_t{unit.row + r} * ctx_.d_v_pad, 1, p, ctx_.p.dtype, v_rows(j),
                       ctx_.d_v);
      }
    }
  }

  const TaskContext<Flash_fwd_params> ctx_;
  const FwdTask& task_;
  const FwdTile& tile_;
  const Scratch& x_;
  const bool fold_scale_;  // products are scores but for the scale
  const float scale_;      // from products (or scores, where modified) to scores
  const float factor_;     // and to units of log2
  const double natural_;   // from those to scores
  const Packed q_, k_, v_, weights_;
  bool v_finite_ = true;
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
