// Scores far from 0: what counts is their distance from each other.
#include <cmath>

#include "attention_problem.h"
#include "expect_close.h"
#include "isa_probe.h"

namespace flash_test {
namespace {

using flash::Dtype;

enum class Far { kProducts, kBias };

struct FarCase {
  Far far;
  int exponent;  // scores are about sign * 2^exponent
  int sign;
  AttentionCase c;
};
std::ostream& operator<<(std::ostream& os, const FarCase& x) {
  constexpr const char* kNames[] = {"products", "bias"};
  return os << kNames[static_cast<int>(x.far)] << " " << x.sign << " * 2^" << x.exponent << ", "
            << x.c;
}

constexpr int kSteps = 16;  // scores differ by multiples of this part of their distance
double step(int exponent) { return std::ldexp(1., std::max(exponent - 22, -3)); }

// Sums of products that fp32 holds exactly, in whatever order: a score is sign * 2^exponent plus a
// small multiple of step(exponent).
AttentionProblem make_problem(const FarCase& x) {
  AttentionProblem problem(x.c, 11);
  const double far = std::ldexp(x.sign, x.exponent);
  const double scale = 1 / std::sqrt(x.c.d);
  const double q_far = x.far == Far::kProducts ? std::ldexp(1., x.exponent / 2) : 0.;
  const double k_far = x.far == Far::kProducts ? far / q_far / scale : 0.;
  problem.q.for_each([&](const PoisonTensor::Index& i) {
    problem.q.set(i, i[3] == 0 ? q_far : i[3] == 1 ? 1. : 0.);
  });
  problem.k.for_each([&](const PoisonTensor::Index& i) {
    const double near = i[1] * 7 % kSteps * step(x.exponent);
    problem.k.set(i, i[3] == 0 ? k_far : i[3] == 1 ? near / scale : 0.);
  });
  problem.bias.for_each([&](const PoisonTensor::Index& i) { problem.bias.set(i, far); });
  const double largest = far + (kSteps - 1) * step(x.exponent);
  problem.sink.for_each([&](const PoisonTensor::Index& i) { problem.sink.set(i, largest); });
  return problem;
}

std::vector<FarCase> all_cases() {
  std::vector<FarCase> cases;
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16})
    for (const int exponent : {4, 9, 11, 16, 22, 30, 33})
      for (const int sign : {1, -1})
        for (const int seqlen_q : {3, 70}) {  // streamed, packed
          AttentionCase c;
          c.dtype = dtype;
          c.h = c.h_k = 1;
          c.seqlens_q = {seqlen_q};
          c.seqlens_k = {140};
          c.right = 0;
          c.has_dlse = true;
          c.has_sink = exponent % 2;
          if (dtype != Dtype::kFloat16 || exponent <= 22)
            cases.push_back({Far::kProducts, exponent, sign, c});
          c.has_bias = true;
          c.bias_extents = {false, false, true, false};
          if (dtype != Dtype::kFloat16 || exponent <= 30)
            cases.push_back({Far::kBias, exponent, sign, c});
        }
  return cases;
}

class FarScores : public testing::TestWithParam<FarCase> {};
INSTANTIATE_TEST_SUITE_P(All, FarScores, testing::ValuesIn(all_cases()));

TEST_P(FarScores, WeighByTheirDistances) {
  const FarCase& x = GetParam();
  AttentionProblem problem = make_problem(x);
  AttentionOutputs expected = problem.reference();
  for (const flash::cpu::Kernels* kernels : all_kernels()) {
    SCOPED_TRACE(kernels->isa);
    AttentionOutputs actual = problem.run(*kernels);
    // Beside what rounding explains elsewhere, softmax_lse is rounded to fp32, up to where the
    // backward finds it out itself.
    const double lse_rounding = std::ldexp(1., std::min(x.exponent, 10) - 23);
    for (const auto& written : actual.written(x.c)) {
      const auto wanted = expected.written(x.c);
      const auto same = std::find_if(wanted.begin(), wanted.end(), [&](const auto& other) {
        return std::string(other.name) == written.name;
      });
      if (std::string(written.name) == "lse")
        expect_close(written.name, *written.tensor, *same->tensor, 3e-7);
      else
        expect_close(written.name, *written.tensor, *same->tensor,
                     (tolerance(x.c.dtype) + lse_rounding) * std::sqrt(written.terms));
    }
  }
}

}  // namespace
}  // namespace flash_test
