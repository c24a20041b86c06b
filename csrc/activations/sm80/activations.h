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

  FLASH_DEVICE static float exp(float x) { return expf(x > 88.f ? 88.f : x); }
  FLASH_DEVICE static float tanh(float x) { return tanhf(x); }
  FLASH_DEVICE static float reciprocal(float x) { return 1.f / x; }
  FLASH_DEVICE static float max_0(float x) { return x <= 0.f ? 0.f : x; }
  FLASH_DEVICE static float step(float x) { return x > 0.f ? 1.f : 0.f; }
  FLASH_DEVICE static float clamp(float x, float limit) {
    const float low = x < -limit ? -limit : x;
    return low > limit ? limit : low;
  }
};

// This thread's place, the same in all tensors.
struct Place {
  int64_t row;
  int column;
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

template <Dtype kDtype, int kCount, class F>
FLASH_DEVICE void backward(const Params& p, const F& f, const Place& place) {
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
  }
  store<kDtype>(p.dx, place, x);
  store<kDtype>(p.dy, place, y);
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
    with_function(p.function, [&](const auto& f) { backward<C.dtype, kCount>(p, f, place); });
  });
}

}  // namespace flash::activations::sm80
