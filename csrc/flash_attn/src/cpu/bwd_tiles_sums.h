// The sums of the backward on bf16 tiles besides products: where their elements lie, what inf and
// NaN add to them, and how they become rows of gradients.
#pragma once

#include "cpu/bwd_tiles_scratch.h"
#include "cpu/mend_products.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// Of a block's 32 rows number `sub`, those that there are.
inline int rows_of_sub(int rows, int sub) {
  const int rest = rows - sub * kBlockRows;
  return rest < kBlockRows ? rest : kBlockRows;
}

template <int kTerms>
class BwdTilesSums {
 public:
  BwdTilesSums(const BwdContext& ctx, const BwdTilesScratch& x) : ctx_(ctx), x_(x) {}

  void clear(int column) const {
    std::memset(dk(column), 0, sizeof(float) * kUnitKeys * ctx_.d_pad);
    std::memset(dv(column), 0, sizeof(float) * kUnitKeys * ctx_.d_v_pad);
  }
  // Of 32 keys of the chunk.
  float* dk(int column) const { return x_.dk + int64_t{column} * kUnitKeys * ctx_.d_pad; }
  float* dv(int column) const { return x_.dv + int64_t{column} * kUnitKeys * ctx_.d_v_pad; }

  // Row r of the block.
  const float* dq_row(const RowBlock& block, int r) const {
    float* sums = ctx_.dq_row(block.row0 + r / kBlockRows * kBlockRows);
    for (int i = 0; i < ctx_.d_pad; i += kTileSide)
      store(x_.staging.buffer + i, load(element(sums, r % kBlockRows, i)));
    return x_.staging.buffer;
  }

  // Copies of P and dS, or of dS as A of dQ, with zeros in place of inf and NaN. False if there
  // are none.
  bool copy_finite_pairs() const { return copy_finite(x_.pairs, 2 * Output::ds_pairs()); }
  bool copy_finite_ds() const { return copy_finite(x_.ds, kTerms * Output::kDsTerm); }

  // What the zeros in place of inf and NaN of rows left out, for 32 keys of the chunk; and those of
  // weights, if products were made of copy_finite_pairs.
  void add_spoilt_rows(const RowBlock& block, int key, bool weights_too) const {
    const int column = key / kUnitKeys * kUnitKeys;
    for (int r = 0; r < block.rows; ++r) {
      const int row = block.row0 + r;
      if (x_.spoilt_dout[r] || weights_too)
        add_spoilt_row(r, key, ctx_.map.tensor_row(ctx_.p.dout, row), x_.pairs,
                       x_.dv + int64_t{column} * ctx_.d_v_pad, ctx_.d_v, x_.spoilt_dout[r]);
      if (x_.spoilt_q[r] || weights_too)
        add_spoilt_row(r, key, ctx_.map.tensor_row(ctx_.p.q, row), x_.pairs + Output::ds_pairs(),
                       x_.dk + int64_t{column} * ctx_.d_pad, ctx_.d, x_.spoilt_q[r]);
    }
  }
  // The same of keys, for 32 rows and a block of keys from key `first` of the chunk on.
  void add_spoilt_keys(const RowBlock& block, int sub, int first, const TileColumns& columns,
                       bool weights_too) const {
    const auto k_rows = ctx_.key_rows(ctx_.p.k, ctx_.key);
    const int64_t bytes = dtype_bytes(ctx_.p.dtype);
    float* dq = ctx_.dq_row(block.row0 + sub * kBlockRows);
    for (int r = 0; r < rows_of_sub(block.rows, sub); ++r) {
      const KeyRange seen = visible(x_.rows[sub * kBlockRows + r], columns);
      for (int j = seen.begin; j < seen.end; ++j) {
        if (!x_.spoilt_k[first + j] && !weights_too) continue;
        const uint32_t* word = x_.ds + (2 * sub + r / kHalf) * Output::kDsRows +
                               j / kTileDepth * kTileWords + r % kHalf * kTileSide + j % kHalf;
        const float weight = sum_of_terms(word, j % kTileDepth / kHalf, Output::kDsTerm);
        const bool all = weights_too && !is_finite(weight);
        if (!x_.spoilt_k[first + j] && !all) continue;
        for (int i = 0; i < ctx_.d; i += kTileSide)
          add_not_finite(element(dq, r, i), 1, weight, ctx_.p.dtype, k_rows(first + j) + i * bytes,
                         ctx_.d - i < kTileSide ? ctx_.d - i : kTileSide, all);
      }
    }
  }

  // A gradient of the chunk's keys, collected as tiles of its transpose.
  void store_transposed(const float* sums, const Operand& gradient, int d, float scale) const {
    const int ld = x_.staging.ld, m_tiles = round_up(d, kTileN) / kTileSide;
    for (int n = 0; n * kTileSide < ctx_.keys; ++n) {
      const float* tiles = sums + (int64_t{n} / 2 * m_tiles * 2 + n % 2) * kTileWords;
      for (int m = 0; m * kTileSide < d; ++m)
        transpose_tile(x_.staging.pairs + m * kTileSide, ld,
                       reinterpret_cast<const uint32_t*>(tiles + m * 2 * kTileWords), kTileSide);
      for (int j = 0; j < kTileSide && n * kTileSide + j < ctx_.keys; ++j)
        ctx_.write_gradient(gradient, n * kTileSide + j,
                            reinterpret_cast<const float*>(x_.staging.pairs) + int64_t{j} * ld, d,
                            scale);
    }
  }

 private:
  using Output = WeightsOutput<kTerms>;

  // Element (i, column) of a group of rows' sums lies at the returned address, 16 columns in a row.
  static float* element(float* sums, int i, int column) {
    return sums + column / 32 * kSumGroup + i / kTileSide * 2 * kTileWords +
           column % 32 / kTileSide * kTileWords + i % kTileSide * kTileSide + column % kTileSide;
  }
  // src without inf and NaN. False if it has none.
  [[gnu::noinline]] bool copy_finite(const uint32_t* src, int64_t words) const {
    VecI found = set1i(0);
    for (int64_t i = 0; i < words; i += kWidth) {
      VecU pairs;
      std::memcpy(&pairs, src + i, sizeof(pairs));
      const VecI low = (pairs & 0x7f80u) == 0x7f80u, high = (pairs & 0x7f800000u) == 0x7f800000u;
      found |= low | high;
      pairs = low ? pairs & 0xffff0000u : pairs;
      store_pairs(x_.finite + i, high ? pairs & 0xffffu : pairs);
    }
    return !all_of(found == 0);
  }

  // The sum of the terms of a row's element in pairs of rows, or in pairs of keys.
  static float sum_of_terms(const uint32_t* word, int half, int64_t term_words) {
    const float first = load_scalar(word, Dtype::kBFloat16, half);
    if (!is_finite(first)) return first;  // others may be inf - inf
    float sum = 0.f;
    for (int t = kTerms - 1; t >= 0; --t)
      sum += load_scalar(word + t * term_words, Dtype::kBFloat16, half);
    return sum;
  }

  // spoilt: the row itself. All of it counts with weights that several terms leave out.
  void add_spoilt_row(int r, int key, const char* row, const uint32_t* weights, float* c, int d,
                      bool spoilt) const {
    const KeyRange seen = visible(x_.rows[r], {0, kUnitKeys, ctx_.key + key});
    const int64_t bytes = dtype_bytes(ctx_.p.dtype);
    for (int j = seen.begin; j < seen.end; ++j) {
      const uint32_t* word = weights + j / kTileSide * Output::kPairsColumn +
                             r / kBlockRows * kTileWords + r % kHalf * kTileSide + j % kTileSide;
      const float weight = sum_of_terms(word, r % kBlockRows / kHalf, Output::kPairsTerm);
      const bool all = kTerms > 1 && !is_finite(weight);
      if (!spoilt && !all) continue;
      for (int i = 0; i < d; i += kTileSide)
        add_not_finite(c + (i / kTileSide * 2 + j / kTileSide) * kTileWords + j % kTileSide,
                       kTileSide, weight, ctx_.p.dtype, row + i * bytes,
                       d - i < kTileSide ? d - i : kTileSide, all);
    }
  }

  const BwdContext& ctx_;
  const BwdTilesScratch& x_;
};

}  // namespace flash::cpu::FLASH_ATTN_ISA
