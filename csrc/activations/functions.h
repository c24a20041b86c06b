// The activation functions and their derivatives, for one number or a vector of them.
#pragma once

#include "activations/params.h"
#include "base/host_device.h"

namespace flash::activations {

template <class F>
struct Value {
  F value, slope;  // f(x), f'(x)
};

// `Math`: the type F of numbers, and functions of them: exp (may be inf above 88), tanh,
// reciprocal, max_0 (of NaN NaN), step (0 up to 0, beyond and of NaN 1) and clamp(x, limit).
template <class Math, class F = typename Math::F>
FLASH_INLINE Value<F> gelu_tanh(F x) {
  constexpr float kScale = 0.7978845608028654f;  // sqrt(2 / pi)
  constexpr float kCubic = 0.044715f;
  const F near = Math::clamp(x, 16.f);  // t is 1 beyond, where squares may overflow
  const F square = near * near;
  const F t = Math::tanh(kScale * near * (1.f + kCubic * square));
  const F slope_of_argument = kScale * (1.f + 3.f * kCubic * square);
  const F half = 0.5f * (1.f + t);
  return {x * half, half + 0.5f * near * ((1.f - t) * (1.f + t)) * slope_of_argument};
}

template <class Math, class F = typename Math::F>
FLASH_INLINE Value<F> sigmoid(F x) {
  const F s = Math::reciprocal(1.f + Math::exp(-x));
  return {s, s * (1.f - s)};
}

template <class Math, class F = typename Math::F>
FLASH_INLINE Value<F> silu(F x) {
  const Value<F> s = sigmoid<Math>(x);
  return {x * s.value, s.value + x * s.slope};
}

template <class Math, class F = typename Math::F>
FLASH_INLINE Value<F> relu(F x) {
  return {Math::max_0(x), Math::step(x)};
}

template <class Math, class F = typename Math::F>
FLASH_INLINE Value<F> sqrelu(F x) {
  const F positive = Math::max_0(x);
  return {positive * positive, 2.f * positive};
}

// body(function as a constant): the loops over elements have no branch. By halves: a switch would
// become a table of addresses, to which no GPU branches quickly.
template <class Body>
FLASH_INLINE void with_function(Function function, const Body& body) {
  if (function < Function::kSqrelu) {
    if (function == Function::kRelu)
      return body([]<class Math>(Math, auto x) { return relu<Math>(x); });
    return body([]<class Math>(Math, auto x) { return gelu_tanh<Math>(x); });
  }
  if (function > Function::kSilu)
    return body([]<class Math>(Math, auto x) { return sigmoid<Math>(x); });
  if (function == Function::kSilu)
    return body([]<class Math>(Math, auto x) { return silu<Math>(x); });
  body([]<class Math>(Math, auto x) { return sqrelu<Math>(x); });
}

}  // namespace flash::activations
