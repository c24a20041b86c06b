// Comparing tensors.
#pragma once

#include <gtest/gtest.h>

#include "poison_tensor.h"

namespace flash_test {

// Largest error, relative to the largest expected magnitude and at least to 1, that rounding
// explains.
inline double tolerance(flash::Dtype t) {
  return t == flash::Dtype::kFloat32 ? 2e-5 : t == flash::Dtype::kFloat16 ? 4e-3 : 3e-2;
}

// Infinities must be where they are expected; NaN fails.
inline void expect_close(const char* name, const PoisonTensor& actual, const PoisonTensor& expected,
                         double tolerance) {
  double largest = 1., worst = 0.;
  PoisonTensor::Index at{};
  expected.for_each([&](const PoisonTensor::Index& i) {
    const double x = std::fabs(expected.get(i));
    if (std::isfinite(x)) largest = std::max(largest, x);
  });
  expected.for_each([&](const PoisonTensor::Index& i) {
    const double x = actual.get(i), y = expected.get(i);
    const double error = x == y ? 0. : std::isfinite(x - y) ? std::fabs(x - y) : INFINITY;
    if (error <= worst) return;
    worst = error;
    at = i;
  });
  EXPECT_LE(worst, tolerance * largest) << name << " at " << testing::PrintToString(at) << ": "
                                        << actual.get(at) << ", expected " << expected.get(at);
  EXPECT_TRUE(actual.untouched_between_elements()) << name << ": written beside its elements";
}

}  // namespace flash_test
