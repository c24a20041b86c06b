// The forward's weights P of a unit of scores, 32 rows x 32 keys, a row at a time between tile
// products; and those products with everything but addresses known to the compiler.
//
// While the tile unit works, a core of the first generations with AMX starts one 512-bit operation
// on floating-point numbers a cycle instead of two, integer operations still two: 16 scores take
// eight of the former (exp2_bf16.h has six of them). Fewer, with more instructions in all, are no
// faster.
#pragma once

#include "cpu/tanh_table.h"
#include "cpu/tile_units.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr float kNoReference = 0x1.fffffep127f;  // any score exceeds it
inline constexpr float kMaxExponent = 8.f;              // weights beyond 2^8 raise the reference

// What is added to exponents, in units of log2, besides products and references: for rows that see
// all keys of a unit. begin_row() once a row, then scaled() for its columns from j on.
struct NoModifier {
  FLASH_INLINE void begin_row() {}
  FLASH_INLINE Vec scaled(Vec product, Vec factor, Vec reference, int) const {
    return fma(product, factor, reference);
  }
};
// Weights are multiplied by V's factors of their keys, once their sum is made.
struct ValueFactors : NoModifier {
  const float* factors;  // [kUnitKeys]
  FLASH_INLINE Vec weight(Vec p, int j) const {
    return select(p == zero(), p, p * load(factors + j));
  }
};
struct AlibiModifier {
  const Row* row;
  int offset;  // of the unit's first key from the diagonal of query 0
  Vec slope{}, distance{};
  FLASH_INLINE void begin_row() {
    slope = set1(row->alibi_slope * -kLog2e);
    distance = to_float(iota() + (offset - row->query));
    ++row;
  }
  FLASH_INLINE Vec scaled(Vec product, Vec factor, Vec reference, int j) const {
    const Vec x = fma(product, factor, reference);
    return fma(slope, abs(distance + static_cast<float>(j)), x);
  }
};
template <Dtype T>
struct BiasModifier {
  const Row* row;
  int64_t offset;  // of the unit's first key from the first, bytes
  const char* bias = nullptr;
  FLASH_INLINE void begin_row() {
    constexpr int kAhead = 4 * kUnitKeys * dtype_bytes(T);  // rows lie far apart
    bias = row->bias + offset;
    __builtin_prefetch(bias + kAhead);
    if constexpr (T == Dtype::kFloat32) __builtin_prefetch(bias + kAhead + 64);
    ++row;
  }
  FLASH_INLINE Vec scaled(Vec product, Vec factor, Vec reference, int j) const {
    return fma(load_as_float<T>(bias, j), set1(kLog2e), fma(product, factor, reference));
  }
};
template <class Terms>
struct SoftcapModifier {
  float inverse;  // products times it are scores by softcap
  float softcap;  // in units of log2
  FLASH_INLINE void begin_row() {}
  FLASH_INLINE Vec scaled(Vec product, Vec, Vec reference, int) const {
    const Vec x = product * inverse;
    return fma(Terms::kTerms < 3 ? tanh_by_table(x) : tanh_of_half(x + x).value, set1(softcap),
               reference);
  }
};

// Where the rows of a unit lie. A weight is exp2(factor * score + reference of its row).
struct WeightRows {
  int rows = 0;
  const float* scores = nullptr;     // [rows][kUnitKeys]
  const float* reference = nullptr;  // [rows]
  const float* before = nullptr;     // [rows][kWidth]: sums
  float* after = nullptr;
  uint16_t* weights = nullptr;  // of row 0, in a tile of A
  int64_t next_tile = 0;        // elements from row 15 to row 16
  int64_t next_term = 0;        // from one term to the next
  float factor = 0.f;
};

// Goes through them.
template <class Terms, class Modifier = NoModifier>
class RowWeigher {
 public:
  FLASH_INLINE explicit RowWeigher(const WeightRows& at, Modifier modifier = {})
      : at_(at), modifier_(modifier) {}

  FLASH_INLINE void weigh() {
    const Vec factor = set1(at_.factor), reference = set1(*at_.reference);
    modifier_.begin_row();
    const Vec x = modifier_.scaled(load(at_.scores), factor, reference, 0);
    const Vec y = modifier_.scaled(load(at_.scores + kWidth), factor, reference, kWidth);
    const Vec low = exp2_for(Terms{}, x), high = exp2_for(Terms{}, y);
    const Vec sum = low + high;
    store(at_.after, load(at_.before) + sum);
    largest_ =
        max(largest_, bits(sum));  // positive floats are ordered as their bits; NaN is largest
    if constexpr (requires { modifier_.weight(low, 0); })
      store_weights(modifier_.weight(low, 0), modifier_.weight(high, kWidth));
    else
      store_weights(low, high);
    ++row_;
    ++at_.reference;
    at_.scores += kUnitKeys;
    at_.before += kWidth;
    at_.after += kWidth;
    at_.weights += row_ == kTileSide ? at_.next_tile : 2 * kTileSide;
  }
  FLASH_INLINE int rows() const { return at_.rows; }
  FLASH_INLINE void finish() {
    while (row_ < at_.rows) weigh();
  }
  // Some weights are larger than 2^kMaxExponent, perhaps inf, or NaN.
  FLASH_INLINE bool exceeds() const {
    constexpr uint32_t kLimit = (127u + static_cast<uint32_t>(kMaxExponent)) << 23;
    return !all_of(largest_ <= kLimit);
  }

 private:
  FLASH_INLINE void store_weights(Vec low, Vec high) const {
    if constexpr (Terms::kTerms == 1)
      store_u16x2(at_.weights, round_to_bf16(low, high));
    else
      split<Terms::kTerms, true>(low, high, [&](int i, VecU16 a, VecU16 b) {
        store_u16(at_.weights + i * at_.next_term, a);
        store_u16(at_.weights + i * at_.next_term + kWidth, b);
      });
  }

  WeightRows at_;
  Modifier modifier_;
  int row_ = 0;
  VecU largest_{};
};

// The rows of a unit, spread evenly over `steps` calls.
template <class Rows>  // RowWeigher
class RowsBetween {
 public:
  FLASH_INLINE RowsBetween(const Rows& rows, int steps) : rows_(rows), steps_(steps) {}
  FLASH_INLINE void operator()() {
    for (due_ += rows_.rows(); due_ >= steps_; due_ -= steps_) rows_.weigh();
  }
  const Rows& rows() const { return rows_; }

 private:
  Rows rows_;
  int steps_, due_ = 0;
};

// 32 x 32 of C, in the first four tile registers, += A B over kDepth tiles.
template <class Tile, int kDepth>
struct FixedProduct {
  FLASH_INLINE static void zero() {
    Tile::template zero<0>();
    Tile::template zero<1>();
    Tile::template zero<2>();
    Tile::template zero<3>();
  }
  // c row-major, its rows ld floats apart.
  FLASH_INLINE static void load(const float* c, int64_t ld) {
    Tile::template load<0>(c, ld * 4);
    Tile::template load<1>(c + kTileSide, ld * 4);
    Tile::template load<2>(c + kTileSide * ld, ld * 4);
    Tile::template load<3>(c + kTileSide * ld + kTileSide, ld * 4);
  }
  // c = or += a b. Rows of tiles of a, columns of tiles of b lie `a_row` and `b_column` tiles
  // apart. kRows rows are weighed between the products and, since no product starts meanwhile, the
  // stores.
  template <int kRows, class Rows>
  FLASH_INLINE static void run(const uint32_t* a, int64_t a_row, const uint32_t* b,
                               int64_t b_column, float* c, int64_t ld, Rows& rows) {
    run<kRows>(a, a_row * kTileWords, b, b_column * kTileWords, rows,
               std::make_integer_sequence<int, kDepth>{});
    Tile::template store<0>(c, ld * 4);
    weigh<kRows, 4 * kDepth>(rows);
    Tile::template store<1>(c + kTileSide, ld * 4);
    weigh<kRows, 4 * kDepth + 1>(rows);
    Tile::template store<2>(c + kTileSide * ld, ld * 4);
    weigh<kRows, 4 * kDepth + 2>(rows);
    Tile::template store<3>(c + kTileSide * ld + kTileSide, ld * 4);
    weigh<kRows, 4 * kDepth + 3>(rows);
  }

 private:
  template <int kRows, class Rows, int... k>
  FLASH_INLINE static void run(const uint32_t* a, int64_t a_row, const uint32_t* b,
                               int64_t b_column, Rows& rows, std::integer_sequence<int, k...>) {
    (multiply<kRows, k>(a + k * kTileWords, a_row, b + k * kTileWords, b_column, rows), ...);
  }
  template <int kRows, int k, class Rows>
  FLASH_INLINE static void multiply(const uint32_t* a, int64_t a_row, const uint32_t* b,
                                    int64_t b_column, Rows& rows) {
    Tile::template load_once<6>(b, 64);
    Tile::template load<4>(a, 64);
    Tile::template multiply<0, 4, 6>();
    weigh<kRows, 4 * k>(rows);
    Tile::template load_once<7>(b + b_column, 64);
    Tile::template multiply<1, 4, 7>();
    weigh<kRows, 4 * k + 1>(rows);
    Tile::template load<5>(a + a_row, 64);
    Tile::template multiply<2, 5, 6>();
    weigh<kRows, 4 * k + 2>(rows);
    Tile::template multiply<3, 5, 7>();
    weigh<kRows, 4 * k + 3>(rows);
  }
  template <int kRows, int kStep, class Rows>
  FLASH_INLINE static void weigh(Rows& rows) {
    constexpr int kSteps = 4 * kDepth + 4;
    constexpr int kCount = (kStep + 1) * kRows / kSteps - kStep * kRows / kSteps;
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) rows.weigh();
  }
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
