// Merging attention over disjoint sets of keys by their log-sum-exp.
//
// A warp owns a row of out. Its lanes share the parts to find the row's state; then each owns every
// 32nd column of kColumns at a time, so that neighbouring lanes read neighbouring elements of a
// part. Parts are read once.
#pragma once

#include "base/ptx/special_registers.h"
#include "base/row_config.h"
#include "common/flash.h"
#include "common/seqlen.h"
#include "common/softmax.h"
#include "sm80/query.h"

namespace flash::sm80 {

// f of the values of a warp's lanes.
template <class F>
FLASH_DEVICE float warp_reduce(float x, const F& f) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    x = f(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

FLASH_DEVICE void store_element(void* row, Dtype dtype, int column, float x) {
  switch (dtype) {
    case Dtype::kFloat16:
      static_cast<uint16_t*>(row)[column] = from_float<Dtype::kFloat16>(x);
      break;
    case Dtype::kBFloat16:
      static_cast<uint16_t*>(row)[column] = from_float<Dtype::kBFloat16>(x);
      break;
    default:
      static_cast<float*>(row)[column] = x;
  }
}

// The parts of one row.
struct Parts {
  const float *lse, *out;
  int64_t lse_stride, out_stride;  // between parts
  int count;

  FLASH_DEVICE float lse_of(int part) const {
    const float x = lse[part * lse_stride];
    return x == INFINITY ? -INFINITY : x;  // the forward's mark of a row without keys
  }

  // Each part is a score of its own.
  FLASH_DEVICE RowState state() const {
    const int lane = ptx::read_tid_x() % 32;
    RowState state;
    for (int i = lane; i < count; i += 32) state.max = fmaxf(state.max, lse_of(i));
    state.max = warp_reduce(state.max, [](float x, float y) { return fmaxf(x, y); });
    for (int i = lane; i < count; i += 32) state.sum += expf(lse_of(i) - state.anchor());
    state.sum = warp_reduce(state.sum, [](float x, float y) { return x + y; });
    return state;
  }

  // The sum of this lane's columns, `first` and every 32nd after it.
  template <int kColumns>
  FLASH_DEVICE void accumulate(float (&o)[kColumns], int first, int columns, float anchor) const {
#pragma unroll
    for (float& x : o) x = 0.f;
    for (int i = 0; i < count; ++i) {
      const float weight = expf(lse_of(i) - anchor);
      if (weight == 0.f) continue;  // an empty part may hold anything
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int column = first + 32 * j;
        if (column < columns) o[j] = fmaf(weight, out[i * out_stride + column], o[j]);
      }
    }
  }
};

template <RowConfig C>
FLASH_DEVICE void combine(const Combine_params& p) {
  static_assert(C.dtype == Dtype::kFloat32);  // of the parts
  constexpr int kColumns = 4;                 // of a lane at a time
  const int64_t row = (static_cast<int64_t>(ptx::read_ctaid_x()) * C.threads() + threadIdx.x) / 32;
  if (row >= p.b * p.s * p.h) return;
  const int64_t h = row % p.h, s = row / p.h % p.s, b = row / p.h / p.s;
  const auto offset = [=](const int64_t* stride) {
    return b * stride[0] + s * stride[1] + h * stride[2];
  };
  const Parts parts{p.lse_partial + offset(p.lse_partial_stride + 1),
                    p.out_partial + offset(p.out_partial_stride + 1), p.lse_partial_stride[0],
                    p.out_partial_stride[0], static_cast<int>(p.splits)};
  const RowState state = parts.state();

  const int lane = ptx::read_tid_x() % 32, d_v = static_cast<int>(p.d_v);
  void* out = operand_row(p.out, p.out_dtype, b, s, h);
  for (int first = lane; first < d_v; first += 32 * kColumns) {
    float o[kColumns];
    parts.accumulate(o, first, d_v, state.anchor());
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int column = first + 32 * j;
      if (column < d_v) store_element(out, p.out_dtype, column, o[j] * state.inverse_sum());
    }
  }
  if (p.lse != nullptr && lane == 0)
    p.lse[offset(p.lse_stride)] = state.sum == 0.f ? state.max : state.lse(1.f);
}

}  // namespace flash::sm80
