// The softmax of FlashAttention-2's forward (arXiv:2307.08691, algorithm 1) for a warp's rows of
// scores.
#pragma once

#include "base/ptx/math.h"
#include "base/static_for.h"
#include "common/softmax.h"
#include "warp/rows.h"
#include "warp/warp_tile.h"

namespace flash::hopper {

// A row's reference, RowState::max, stays until a score exceeds it by a factor of 2^8, of e4m3 2^4:
// until then sums and outputs, which grow by this much at most, need no new scale. Exact all the
// same: they are divided by each other in the end.
template <Dtype kDtype>
inline constexpr float kMaxGrowth = kDtype == Dtype::kFloat8E4M3 ? 4.f : 8.f;

// Exponentials are 2^-kHeadroom times what they are called, so that none is above 1 however much it
// has grown: P V of bf16 numbers near the largest of fp32 would overflow. fp16 cannot, and its
// range is too short for it. Of e4m3, whose normal numbers are 2^-6 to 448, they are 2^4 times what
// they are called, 2^8 at most: precise down to 2^-10 of a row's largest, or 2^-14.
template <Dtype kDtype>
inline constexpr int kHeadroom = kDtype == Dtype::kBFloat16     ? 8
                                 : kDtype == Dtype::kFloat8E4M3 ? -4
                                                                : 0;

// 2^x by FMAs, for x <= 8: 2^floor(x + 1/2) times a polynomial in the rest; relative error
// at most 2.6e-6. NaN stays NaN; below 2^-126.5 all is 0.
FLASH_DEVICE float ex2_by_fma(float x) {
  x = ptx::max_nan(x, -127.f);          // whose power of 2 has an exponent field of 0: it is 0
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to integers
  const float shifted = x + kRound;
  const float rest = x - (shifted - kRound);  // -1/2 .. 1/2
  float y = fmaf(rest, 0.0095701f, 0.05591786f);
  y = fmaf(y, rest, 0.24024745f);
  y = fmaf(y, rest, 0.69312181f);
  y = fmaf(y, rest, 0.99999926f);
  return y * __int_as_float((__float_as_int(shifted) << 23) + 0x3f800000);
}

// The states of a warp's rows.
template <auto C>
struct Softmax {
  using W = WarpTile<C>;
  using Scores = typename W::Scores;

  typename W::Rows rows;      // `sum`: of this lane's columns
  float scaled_reference[2];  // what is subtracted after the scale: of far rows the headroom alone
  bool has_far;               // some of the warp's rows are far

  // Whether a row's reference is subtracted before the scale: rounding the scaled one would be
  // seen. No row's bits depend on its neighbours'.
  FLASH_DEVICE bool is_far(int half, float scale_log2) const {
    return fabsf(rows[0][half].anchor() * scale_log2) > kMaxFusedAnchor;
  }

  FLASH_DEVICE Softmax() {
    clear_rows<C>(rows);
    scaled_reference[0] = scaled_reference[1] = kHeadroom<C.dtype>;
    has_far = false;
  }

  // Raises references to where rS asks for it, which is seldom after the first block of a tile:
  // sums and, by on_raise(factors), outputs of earlier blocks must be multiplied then.
  template <class OnRaise>
  FLASH_DEVICE void raise_references(const Scores& rS, float scale_log2, const OnRaise& on_raise) {
    float largest[2];
    row_maxima(rS, largest);
    raise_references(largest, scale_log2, on_raise);
  }

  // The largest of rS in each of this lane's rows.
  FLASH_DEVICE static void row_maxima(const Scores& rS, float (&largest)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      largest[half] = fmaxf(rS[0][0][2 * half], rS[0][0][2 * half + 1]);
#pragma unroll
      for (int n = 1; n < W::kS; ++n)
        largest[half] = fmaxf(largest[half], fmaxf(rS[0][n][2 * half], rS[0][n][2 * half + 1]));
      largest[half] = quad_max(largest[half]);
    }
  }

  // The same for scores whose largest are `largest`.
  template <class OnRaise>
  FLASH_DEVICE void raise_references(const float (&largest)[2], float scale_log2,
                                     const OnRaise& on_raise) {
    bool grows = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      grows |= (largest[half] - rows[0][half].max) * scale_log2 > kMaxGrowth<C.dtype>;
    }
    if (!__any_sync(0xffffffffu, grows)) return;
    float factors[2];
    bool far = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RowState& row = rows[0][half];
      factors[half] = 1.f;
      if ((largest[half] - row.max) * scale_log2 > kMaxGrowth<C.dtype>) {
        factors[half] = ptx::ex2((row.max - largest[half]) * scale_log2);
        row.max = largest[half];
        row.sum *= factors[half];
      }
      scaled_reference[half] =
          kHeadroom<C.dtype> + (is_far(half, scale_log2) ? 0.f : row.anchor() * scale_log2);
      far |= is_far(half, scale_log2);
    }
    has_far = __any_sync(0xffffffffu, far);
    on_raise(factors);
  }

  // Takes the headroom out of the sums. Returns what outputs must be multiplied by.
  FLASH_DEVICE float finish() {
    constexpr int kBits = kHeadroom<C.dtype>;
    constexpr float kFactor = kBits < 0 ? 1.f / (1 << -kBits) : 1 << kBits;
#pragma unroll
    for (int half = 0; half < 2; ++half) rows[0][half].sum *= kFactor;
    return kFactor;
  }

  // rS = 2^(scale_log2 (rS - reference)), the unnormalised probabilities, which the rows' sums take
  // in. `kIsFull`: no score is hidden.
  template <bool kIsFull>
  FLASH_DEVICE void exponentials(Scores& rS, float scale_log2) {
    constexpr int kPolynomial = kIsFull ? C.tile().polynomial : 0;
    if (has_far) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!is_far(half, scale_log2)) continue;
#pragma unroll
        for (int n = 0; n < W::kS; ++n) {
          rS[0][n][2 * half] -= rows[0][half].anchor();
          rS[0][n][2 * half + 1] -= rows[0][half].anchor();
        }
      }
    }
    static_for<2>([&](auto half) {
      const float reference = scaled_reference[half];
      float sums[2] = {rows[0][half].sum, 0.f};
      static_for<W::kS>([&](auto n) {
        static_for<2>([&](auto i) {
          float& s = rS[0][n][2 * half + i];
          const float x = fmaf(s, scale_log2, -reference);
          if constexpr (kPolynomial > 0 && (2 * n + i) % (kPolynomial > 0 ? kPolynomial : 1) == 1) {
            s = ex2_by_fma(x);
          } else {
            s = ptx::ex2(x);
          }
          sums[i] += s;
        });
      });
      rows[0][half].sum = sums[0] + sums[1];
    });
  }
};

template <auto C>
FLASH_DEVICE void pack(typename WarpTile<C>::Probabilities& rP,
                       const typename WarpTile<C>::Scores& rS) {
#pragma unroll
  for (int n = 0; n < WarpTile<C>::kS; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      rP[0][n][half] = ptx::pack<C.dtype>(rS[0][n][2 * half], rS[0][n][2 * half + 1]);
}

// The columns of a block's keys in a row: hopper/transpose_v.h.
template <FwdConfig C>
FLASH_DEVICE void pack_in_8_bits(typename WarpTile<C>::Probabilities& rP,
                                 const typename WarpTile<C>::Scores& rS) {
#pragma unroll
  for (int n = 0; n < WarpTile<C>::kP; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float *even = rS[0][2 * n] + 2 * half, *odd = rS[0][2 * n + 1] + 2 * half;
      rP[0][n][half] = ptx::pack_e4m3(even[0], even[1], odd[0], odd[1]);
    }
}

template <FwdConfig C>
FLASH_DEVICE void multiply_scores(typename WarpTile<C>::Scores& rS, float factor) {
#pragma unroll
  for (int n = 0; n < WarpTile<C>::kS; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) rS[0][n][i] *= factor;
}

template <auto C>
FLASH_DEVICE void multiply_rows(typename WarpTile<C>::Output& rO, const float (&factors)[2]) {
#pragma unroll
  for (int n = 0; n < WarpTile<C>::kO; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) rO[0][n][i] *= factors[i / 2];
}

}  // namespace flash::hopper
