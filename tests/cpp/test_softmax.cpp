// The softmax state of a row: sums in parts against the whole.
#include "common/softmax.h"

#include <gtest/gtest.h>

#include <limits>
#include <vector>

namespace flash_test {
namespace {

using flash::MergeFactors;
using flash::RowState;

constexpr float kInf = std::numeric_limits<float>::infinity();
const auto natural = [](float x) { return std::exp(x); };

RowState state_of(const std::vector<float>& scores) {
  RowState state;
  for (float score : scores) merge(state, {score, 1.f}, natural);
  return state;
}

TEST(RowState, RaiseReturnsWhatSumsSoFarAreMultipliedBy) {
  RowState state{2.f, 3.f};
  EXPECT_EQ(state.raise(1.f, natural), 1.f);
  EXPECT_EQ(state.max, 2.f);
  EXPECT_FLOAT_EQ(state.raise(4.f, natural), std::exp(-2.f));
  EXPECT_EQ(state.max, 4.f);
  EXPECT_EQ(state.sum, 3.f);
}

TEST(RowState, ARowWithoutKeysStaysOne) {
  RowState state;
  EXPECT_EQ(state.raise(-kInf, natural), 1.f);
  const MergeFactors factors = merge(state, RowState{}, natural);
  EXPECT_FALSE(std::isnan(factors.total) || std::isnan(factors.part));
  EXPECT_EQ(state.max, -kInf);
  EXPECT_EQ(state.sum, 0.f);
  EXPECT_EQ(state.inverse_sum(), 0.f);
  EXPECT_EQ(state.lse(1.f), kInf);
}

TEST(RowState, MergedPartsAreTheWhole) {
  const std::vector<std::vector<float>> parts = {{},           {-1.f, 2.f, .5f}, {-kInf},
                                                 {7.f, -kInf}, {6.5f, 7.f},      {-80.f}};
  RowState total;
  std::vector<float> all;
  for (const std::vector<float>& part : parts) {
    merge(total, state_of(part), natural);
    all.insert(all.end(), part.begin(), part.end());
  }
  double sum = 0.;
  for (float score : all) sum += std::exp(static_cast<double>(score));
  EXPECT_EQ(total.max, 7.f);
  EXPECT_NEAR(total.lse(1.f), std::log(sum), 1e-6);
}

// Outputs are sums of exp(score - anchor) value; the values here are 1, 10 and 100.
TEST(RowState, MergeFactorsAddUnnormalisedOutputs) {
  RowState total = state_of({1.f}), part = state_of({3.f, 2.f});
  const float total_output = 1.f, part_output = 10.f + 100.f * std::exp(-1.f);
  const MergeFactors factors = merge(total, part, natural);
  const double expected = (std::exp(1.) + 10. * std::exp(3.) + 100. * std::exp(2.)) /
                          (std::exp(1.) + std::exp(3.) + std::exp(2.));
  EXPECT_NEAR((total_output * factors.total + part_output * factors.part) * total.inverse_sum(),
              expected, 1e-4);
}

}  // namespace
}  // namespace flash_test
