// What scores go through before the softmax, and probabilities after it: softcap, ALiBi, bias, dropout.
#pragma once

#include "sm80/query.h"
#include "sm80/steps.h"

namespace flash::sm80 {

inline constexpr float kLog2e = 1.4426950408889634f;

// 1 - 2 / (e^(2 x) + 1): absolute error about 2^-23, which softcap multiplies.
FLASH_DEVICE float tanh(float x) {
  return 1.f - __fdividef(2.f, ptx::ex2(x * (2.f * kLog2e)) + 1.f);
}

FLASH_DEVICE float load_bias(const Bias& bias, int64_t index) {
  switch (bias.dtype) {
    case Dtype::kFloat16:
      return to_float<Dtype::kFloat16>(static_cast<const uint16_t*>(bias.ptr)[index]);
    case Dtype::kBFloat16:
      return to_float<Dtype::kBFloat16>(static_cast<const uint16_t*>(bias.ptr)[index]);
    default:
      return static_cast<const float*>(bias.ptr)[index];
  }
}

// What the modifiers of a warp's scores depend on.
struct ScorePlace {
  int batch, head;
  int first_row;  // of the warp's tile
  const Mask& mask;
};

// rS: products of q and k become natural logits, softcap(softmax_scale s) - slope |distance| + bias.
// `first_key` is that of the block.
template <FwdConfig C>
FLASH_DEVICE void modify_scores(typename WarpTile<C>::Scores& rS, const ScoreParams& p,
                                const ScorePlace& place, int first_key) {
  using W = WarpTile<C>;
  const int lane = ptx::read_tid_x() % 32;
  // f(score, query, key) of each element of this lane.
  const auto for_each = [&](const auto& f) {
#pragma unroll
    for (int m = 0; m < W::kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const ptx::Element first = ptx::accumulator_element(lane, 2 * half);
        const int query = place.first_row + m * 16 + first.row;
#pragma unroll
        for (int n = 0; n < W::kS; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            f(rS[m][n][2 * half + i], query, first_key + n * 8 + first.col + i);
      }
    }
  };
  for_each([&](float& s, int, int) { s *= p.scale_softmax; });
  if (p.softcap > 0.f) {
    const float inverse = 1.f / p.softcap;
    for_each([&](float& s, int, int) { s = p.softcap * tanh(s * inverse); });
  }
  if (p.alibi_slopes != nullptr) {
    const float slope = p.alibi_slopes[place.batch * p.alibi_batch_stride + place.head];
    const int shift = place.mask.seqlen_k - place.mask.seqlen_q;
    for_each([&](float& s, int query, int key) {
      s = fmaf(-slope, fabsf(static_cast<float>(query + shift - key)), s);
    });
  }
  if (p.bias.ptr != nullptr) {
    const int64_t base = place.batch * p.bias.batch_stride + place.head * p.bias.head_stride;
    for_each([&](float& s, int query, int key) {
      if (query < place.mask.seqlen_q && key < place.mask.seqlen_k)
        s += load_bias(p.bias, base + query * p.bias.row_stride + key * p.bias.col_stride);
    });
  }
}

// rP: 0 where dropout drops. One call of Philox serves the 16 probabilities that this lane holds of
// 32 keys (common/dropout.h).
template <FwdConfig C>
FLASH_DEVICE void drop(typename WarpTile<C>::Probabilities& rP, const Dropout& dropout,
                       uint32_t batch_head, int first_row, int first_key) {
  using W = WarpTile<C>;
  const int lane = ptx::read_tid_x() % 32;
  const uint32_t threshold = dropout.keep_threshold * 0x01010101u;
#pragma unroll
  for (int m = 0; m < W::kM; ++m) {
#pragma unroll
    for (int block = 0; block < W::kS / 4; ++block) {
      const Philox4 random = dropout.random(batch_head, first_row + m * 16 + lane / 4,
                                            first_key / 32 + block, lane % 4);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const uint32_t kept = __vcmpleu4(random.x[t], threshold);  // 0xff or 0x00 a byte
#pragma unroll
        for (int half = 0; half < 2; ++half)
          rP[m][4 * block + t][half] &= __byte_perm(kept, 0, half == 0 ? 0x1100 : 0x3322);
      }
    }
  }
}

}  // namespace flash::sm80
