// Activation functions on CUDA: a thread owns one chunk of 16 bytes of each tensor, or one element
// where rows are not made of chunks. Each element is read once and written once: memory is the
// bound.
#pragma once

#include "activations/functions.h"
#include "activations/sm80/launch_params.h"
#include "base/ptx/elements.h"
#include "base/ptx/special_registers.h"
#include "base/row_config.h"
#include "base/static_for.h"

namespace flash::activations::sm80 {

struct FloatMath {
  using F = float;

  FLASH_DEVICE static float exp(float x) { return expf(x); }
  FLASH_DEVICE static float tanh(float x) { return tanhf(x); }
  FLASH_DEVICE static float reciprocal(float x) { return 1.f / x; }
  FLASH_DEVICE static float max_0(float x) { return x <= 0.f ? 0.f : x; }
  FLASH_DEVICE static float step(float x) { return x <= 0.f ? 0.f : 1.f; }
  FLASH_DEVICE static float clamp(float x, float limit) {
    const float low = x < -limit ? -limit : x;
    return low > limit ? limit : low;
  }
};

// This thread's place, the same in all tensors.
struct Place {
  int row, column;
};

// kCount elements of a tensor of the call; `absent` where it is not given.
template <Dtype kDtype, int kCount>
FLASH_DEVICE void load(float (&x)[kCount], const Matrix& m, const Place& place, float absent) {
#pragma unroll
  for (float& element : x) element = absent;
  constexpr int kBytes = dtype_bytes(kDtype);
  if (m.ptr != nullptr)
    ptx::load_elements<kDtype>(x, m.row(place.row, kBytes) + place.column * kBytes);
}

template <Dtype kDtype, int kCount>
FLASH_DEVICE void store(const Matrix& m, const Place& place, const float (&x)[kCount]) {
  constexpr int kBytes = dtype_bytes(kDtype);
  if (m.ptr != nullptr)
    ptx::store_elements<kDtype>(m.row(place.row, kBytes) + place.column * kBytes, x);
}

template <Dtype kDtype, int kCount, class F>
FLASH_DEVICE void forward(const Params& p, const F& f, const Place& place) {
  float x[kCount], bias[kCount], y[kCount];
  load<kDtype>(x, p.x, place, 0.f);
  load<kDtype>(bias, p.bias, place, 0.f);
  load<kDtype>(y, p.y, place, 1.f);
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = f(FloatMath{}, x[i] + bias[i]).value * y[i];
  store<kDtype>(p.out, place, x);
}

// Of one row; sums[i] takes dx in addition.
template <Dtype kDtype, int kCount, class F>
FLASH_DEVICE void backward(const Params& p, const F& f, const Place& place, float (&sums)[kCount]) {
  float x[kCount], bias[kCount], y[kCount], dout[kCount];
  load<kDtype>(x, p.x, place, 0.f);
  load<kDtype>(bias, p.bias, place, 0.f);
  load<kDtype>(y, p.y, place, 1.f);
  load<kDtype>(dout, p.dout, place, 0.f);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const auto [value, slope] = f(FloatMath{}, x[i] + bias[i]);
    x[i] = dout[i] * y[i] * slope;
    y[i] = dout[i] * value;
    sums[i] += x[i];
  }
  store<kDtype>(p.dx, place, x);
  store<kDtype>(p.dy, place, y);
}

// Of this thread's strip of rows, the first of which is `strip.row`.
template <Dtype kDtype, int kCount, class F>
FLASH_DEVICE void backward_of_strip(const Params& p, const Launch& launch, const F& f,
                                    const Place& strip) {
  float sums[kCount] = {};
  Place place{strip.row * launch.rows_of_strip, strip.column};
  const int left = static_cast<int>(p.rows) - place.row;
  const int end = place.row + (left < launch.rows_of_strip ? left : launch.rows_of_strip);
#pragma unroll 1
  for (; place.row < end; ++place.row) backward<kDtype, kCount>(p, f, place, sums);
  if (launch.sums == nullptr) return;
  ptx::store_elements<Dtype::kFloat32>(launch.sums + strip.row * p.cols + strip.column, sums);
}

// Calls body(place, number of elements as a constant) where this thread has any.
template <RowConfig C, class Body>
FLASH_DEVICE void with_place(const Launch& launch, const Body& body) {
  constexpr int kChunk = ptx::kElementsOfChunk<C.dtype>;
  const int64_t thread = static_cast<int64_t>(ptx::read_ctaid_x()) * C.threads() + threadIdx.x;
  if (thread >= launch.threads) return;
  const int row = launch.threads_of_row.quotient(static_cast<int>(thread));
  const int column = static_cast<int>(thread) - row * launch.threads_of_row.divisor;
  if (launch.by_chunks) {
    body(Place{row, column * kChunk}, Constant<kChunk>{});
  } else {
    body(Place{row, column}, Constant<1>{});
  }
}

template <RowConfig C>
FLASH_DEVICE void activation_fwd(const Params& p, const Launch& launch) {
  with_place<C>(launch, [&]<int kCount>(const Place& place, Constant<kCount>) {
    with_function(p.function, [&](const auto& f) { forward<C.dtype, kCount>(p, f, place); });
  });
}

template <RowConfig C>
FLASH_DEVICE void activation_bwd(const Params& p, const Launch& launch) {
  with_place<C>(launch, [&]<int kCount>(const Place& place, Constant<kCount>) {
    with_function(p.function,
                  [&](const auto& f) { backward_of_strip<C.dtype, kCount>(p, launch, f, place); });
  });
}

// A column for each thread.
template <RowConfig C>
FLASH_DEVICE void activation_dbias(const Params& p, const Launch& launch) {
  const int64_t column = static_cast<int64_t>(ptx::read_ctaid_x()) * C.threads() + threadIdx.x;
  if (column >= launch.threads) return;
  float sum = 0.f;
#pragma unroll 8
  for (int strip = 0; strip < launch.strips; ++strip) sum += launch.sums[strip * p.cols + column];
  p.dbias[column] = sum;
}

}  // namespace flash::activations::sm80
