// The forward's weights P of a unit of scores, 32 rows x 32 keys, a row at a time between tile
// products; and those products with everything but addresses known to the compiler.
//
// While the tile unit works, a core of the first generations with AMX starts one 512-bit operation
// on floating-point numbers a cycle instead of two, integer operations still two: 16 scores take
// seven of the former (exp2_bf16.h has five of them).
#pragma once

#include "cpu/tile_units.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr float kNoReference = 0x1.fffffep127f;  // any score exceeds it
inline constexpr float kMaxExponent = 8.f;              // weights beyond 2^8 raise the reference

// Goes through the rows of a unit. A weight is exp2(factor * score + reference of its row).
template <class Terms>
class RowWeigher {
 public:
  RowWeigher() = default;
  // scores [rows][kUnitKeys]; sums before and after, a vector a row; weights of row 0 in a tile of
  // A, those of row 16 `next_tile` elements behind those of row 15, the next term's `next_term`.
  FLASH_INLINE RowWeigher(int rows, const float* scores, const float* reference,
                          const float* before, float* after, uint16_t* weights, float factor,
                          int64_t next_tile, int64_t next_term)
      : scores_(scores),
        reference_(reference),
        before_(before),
        after_(after),
        weights_(weights),
        factor_(factor),
        next_tile_(next_tile),
        next_term_(next_term),
        rows_(rows) {}

  FLASH_INLINE void weigh() {
    const Vec factor = set1(factor_), reference = set1(*reference_);
    const Vec x = fma(load(scores_), factor, reference);
    const Vec y = fma(load(scores_ + kWidth), factor, reference);
    // As integers, floats keep their order as long as one of the two is positive.
    largest_ = max(largest_, max(reinterpret_cast<VecI>(x), reinterpret_cast<VecI>(y)));
    const Vec low = exp2_for(Terms{}, x), high = exp2_for(Terms{}, y);
    store(after_, load(before_) + (low + high));
    store_weights(low, high);
    ++row_;
    ++reference_;
    scores_ += kUnitKeys;
    before_ += kWidth;
    after_ += kWidth;
    weights_ += row_ == kTileSide ? next_tile_ : 2 * kTileSide;
  }
  FLASH_INLINE int rows() const { return rows_; }
  FLASH_INLINE void finish() {
    while (row_ < rows_) weigh();
  }
  // Some exponents are larger than kMaxExponent: their weights are not right.
  FLASH_INLINE bool exceeds() const {
    constexpr int32_t kLimit = (127 + 3) << 23;  // the bits of 8
    static_assert(kMaxExponent == 8.f);
    return !all_of(largest_ <= kLimit);
  }

 private:
  FLASH_INLINE void store_weights(Vec low, Vec high) const {
    if constexpr (Terms::kTerms == 1)
      store_u16x2(weights_, round_to_bf16(low, high));
    else
      split<Terms::kTerms, true>(low, high, [&](int i, VecU16 a, VecU16 b) {
        store_u16(weights_ + i * next_term_, a);
        store_u16(weights_ + i * next_term_ + kWidth, b);
      });
  }

  const float *scores_ = nullptr, *reference_ = nullptr, *before_ = nullptr;
  float* after_ = nullptr;
  uint16_t* weights_ = nullptr;
  float factor_ = 0.f;
  int64_t next_tile_ = 0, next_term_ = 0;
  int row_ = 0, rows_ = 0;
  VecI largest_{};
};

// The rows of a unit, spread evenly over `steps` calls.
template <class Terms>
class SpreadRows {
 public:
  FLASH_INLINE SpreadRows(const RowWeigher<Terms>& rows, int steps) : rows_(rows), steps_(steps) {}
  FLASH_INLINE void operator()() {
    for (due_ += rows_.rows(); due_ >= steps_; due_ -= steps_) rows_.weigh();
  }
  const RowWeigher<Terms>& rows() const { return rows_; }

 private:
  RowWeigher<Terms> rows_;
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
