// What scores go through before the softmax, and probabilities after it: softcap, ALiBi, bias,
// dropout.
#pragma once

#include <cstdint>

#include "base/ptx/elements.h"
#include "base/ptx/fragments.h"
#include "base/ptx/math.h"
#include "base/ptx/special_registers.h"
#include "common/dropout.h"
#include "common/flash.h"
#include "common/mask.h"
#include "warp/attention_launch.h"
#include "warp/warp_tile.h"

namespace flash {

// What the modifiers of a warp's scores depend on.
struct ScorePlace {
  int batch, head;
  int first_row;  // of the warp's tile
  const Mask& mask;
};

// f(score, m, half, column) of each of this lane's scores: row m * 16 + half * 8 from the lane's
// first, `column` from the lane's first.
template <auto C, class F>
FLASH_DEVICE void for_each_score(typename WarpTile<C>::Scores& rS, const F& f) {
  using W = WarpTile<C>;
#pragma unroll
  for (int m = 0; m < W::kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < W::kS; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) f(rS[m][n][2 * half + i], m * 16 + half * 8, n * 8 + i);
}

// Up to this softcap an absolute error of 2^-23 softcap is less than what logits are rounded by.
inline constexpr float kMaxSimpleSoftcap = 64.f;

// tanh(x) for small x, by its series: relative error at most 2^-21 up to |x| = 1/4.
FLASH_DEVICE float small_tanh(float x) {
  const float y = x * x;
  const float series = fmaf(fmaf(y, -17.f / 315.f, 2.f / 15.f), y, -1.f / 3.f);
  return fmaf(x * y, series, x);
}

// rS: products of q and k become softcap * tanh(x), x = scale s / softcap, by 1 - 2 / (e^(2 x) +
// 1): an absolute error of about 2^-23 softcap. A large softcap takes the series near 0, where that
// would be all that is left of a score.
template <auto C>
FLASH_DEVICE void cap_scores(typename WarpTile<C>::Scores& rS, const ScoreParams& p) {
  const float cap = p.softcap, factor = p.scale_softmax / cap, exponent = factor * (2.f * kLog2e);
  const auto capped = [=](float s) {
    return fmaf(-2.f * cap, ptx::rcp(ptx::ex2(s * exponent) + 1.f), cap);
  };
  if (cap <= kMaxSimpleSoftcap) {
    for_each_score<C>(rS, [=](float& s, int, int) { s = capped(s); });
  } else {
    for_each_score<C>(rS, [=](float& s, int, int) {
      const float x = s * factor;
      s = fabsf(x) < 0.25f ? cap * small_tanh(x) : capped(s);
    });
  }
}

// rS = scale rS - slope |distance|. Distances are exact up to 2^24.
template <auto C>
FLASH_DEVICE void add_alibi(typename WarpTile<C>::Scores& rS, float scale, const ScoreParams& p,
                            const ScorePlace& place, int first_key) {
  const float slope = p.alibi_slopes[place.batch * p.alibi_batch_stride + place.head];
  const ptx::Element first = ptx::accumulator_element(ptx::read_tid_x() % 32, 0);
  const int diagonal =
      ptx::opaque(place.first_row) + first.row + place.mask.seqlen_k - place.mask.seqlen_q;
  const float distance = static_cast<float>(diagonal - first_key - first.col);
  for_each_score<C>(rS, [=](float& s, int row, int column) {
    s = fmaf(-slope, fabsf(distance + static_cast<float>(row - column)), scale * s);
  });
}

// rS = scale rS + bias, whose elements to_float(element) makes floats. Rows of no query take the
// last one's.
template <auto C, class Element, class ToFloat>
FLASH_DEVICE void add_bias(typename WarpTile<C>::Scores& rS, float scale, const Bias& bias,
                           const ScorePlace& place, int first_key, const ToFloat& to_float) {
  const ptx::Element first = ptx::accumulator_element(ptx::read_tid_x() % 32, 0);
  const int query = ptx::opaque(place.first_row) + first.row, key = first_key + first.col;
  const Element* head_of_bias = static_cast<const Element*>(bias.ptr) +
                                place.batch * bias.batch_stride + place.head * bias.head_stride +
                                key * bias.col_stride;
  const int columns = place.mask.seqlen_k - key;
  const Element* row_of_bias = nullptr;
  for_each_score<C>(rS, [&](float& s, int row, int column) {
    if (column == 0) {
      row_of_bias = head_of_bias + min(query + row, place.mask.seqlen_q - 1) * bias.row_stride;
      ptx::keep_loads_behind();  // a row at a time, for the registers' sake
    }
    const float b = column < columns ? to_float(row_of_bias[column * bias.col_stride]) : 0.f;
    s = fmaf(s, scale, b);
  });
}

// rS: products of q and k become natural logits, softcap(softmax_scale s) - slope |distance| +
// bias. `first_key` is that of the block.
// `on_capped(rS)` is called where a softcap has just been applied.
template <auto C, class OnCapped>
FLASH_DEVICE void modify_scores(typename WarpTile<C>::Scores& rS, const ScoreParams& p,
                                const ScorePlace& place, int first_key, const OnCapped& on_capped) {
  float scale = p.scale_softmax;  // that is still to come
  if (p.softcap > 0.f) {
    cap_scores<C>(rS, p);
    on_capped(rS);
    scale = 1.f;
  }
  if (p.alibi_slopes != nullptr) {
    add_alibi<C>(rS, scale, p, place, first_key);
    scale = 1.f;
  }
  // Kernels of 8 bits have none.
  if constexpr (dtype_bytes(C.dtype) > 1) {
    if (p.bias.ptr == nullptr) return;
    if (p.bias.dtype == Dtype::kFloat32) {
      add_bias<C, float>(rS, scale, p.bias, place, first_key, [](float x) { return x; });
    } else {  // otherwise the dtype of q
      add_bias<C, uint16_t>(rS, scale, p.bias, place, first_key, ptx::to_float<C.dtype>);
    }
  }
}

template <auto C>
FLASH_DEVICE void modify_scores(typename WarpTile<C>::Scores& rS, const ScoreParams& p,
                                const ScorePlace& place, int first_key) {
  modify_scores<C>(rS, p, place, first_key, [](const auto&) {});
}

// 0x80 in each byte of x that is at most the byte of `limit`; other bits are anything.
FLASH_DEVICE uint32_t at_most(uint32_t x, uint32_t limit) {
  const uint32_t low = (limit | 0x80808080u) - (x & 0x7f7f7f7fu);  // no borrow between bytes
  return (limit & ~x) | (~(limit ^ x) & low);
}

struct MultiplyWideInPtx {
  FLASH_DEVICE WideProduct operator()(uint32_t a, uint32_t b) const {
    const uint2 x = ptx::mul_wide(a, b);
    return {x.x, x.y};
  }
};

// What dropout keeps of a warp's scores: word t of m16 tile m has the signs of its bytes set for
// the kept ones of n8 tile t, as common/dropout.h orders them.
template <auto C>
using Kept = uint32_t[WarpTile<C>::kM][WarpTile<C>::kS];

// One call of Philox serves the 16 scores that this lane holds of 32 keys.
template <auto C>
FLASH_DEVICE void draw(Kept<C>& kept, const Dropout& dropout, uint32_t batch_head, int first_row,
                       int first_key) {
  using W = WarpTile<C>;
  constexpr int kTiles = W::kS < 4 ? W::kS : 4;  // that a call serves
  const int lane = ptx::read_tid_x() % 32;
  const uint32_t threshold = dropout.keep_threshold * 0x01010101u;
  const int row = ptx::opaque(first_row) + lane / 4;
#pragma unroll
  for (int m = 0; m < W::kM; ++m) {
#pragma unroll
    for (int block = 0; block < W::kS / kTiles; ++block) {
      const Philox4 random = dropout.random(batch_head, row + m * 16, first_key / 32 + block,
                                            lane % 4, MultiplyWideInPtx{});
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const uint32_t bytes =
            kTiles < 4 && first_key % 32 != 0 ? random.x[t + 4 - kTiles] : random.x[t];
        kept[m][kTiles * block + t] = at_most(bytes, threshold);
      }
    }
  }
}

// rP: 0 where dropout drops.
template <auto C>
FLASH_DEVICE void drop(typename WarpTile<C>::Probabilities& rP, const Kept<C>& kept) {
  using W = WarpTile<C>;
#pragma unroll
  for (int m = 0; m < W::kM; ++m) {
#pragma unroll
    for (int n = 0; n < W::kS; ++n) {
      rP[m][n][0] &= ptx::prmt<0x9988>(kept[m][n]);
      rP[m][n][1] &= ptx::prmt<0xbbaa>(kept[m][n]);
    }
  }
}

template <auto C>
FLASH_DEVICE void drop(typename WarpTile<C>::Probabilities& rP, const Dropout& dropout,
                       uint32_t batch_head, int first_row, int first_key) {
  Kept<C> kept;
  draw<C>(kept, dropout, batch_head, first_row, first_key);
  drop<C>(rP, kept);
}

}  // namespace flash
