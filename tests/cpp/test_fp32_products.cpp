// FLASH_ATTENTION_CPU_FP32_PRODUCTS; CMakeLists.txt runs this once without and once with 3.
#include <cstdlib>

#include "attention_problem.h"
#include "isa_probe.h"

namespace flash_test {
namespace {

double worst_error(const PoisonTensor& actual, const PoisonTensor& expected) {
  double worst = 0., largest = 0.;
  expected.for_each([&](const PoisonTensor::Index& i) {
    worst = std::max(worst, std::fabs(actual.get(i) - expected.get(i)));
    largest = std::max(largest, std::fabs(expected.get(i)));
  });
  return worst / largest;
}

TEST(Fp32Products, SixAreExactThreeAreNot) {
  const bool three = std::getenv("FLASH_ATTENTION_CPU_FP32_PRODUCTS") != nullptr;
  AttentionCase c;
  c.dtype = flash::Dtype::kFloat32;
  c.h = c.h_k = 2;
  c.d = c.d_v = 64;
  c.seqlens_q = c.seqlens_k = {200};
  AttentionProblem problem(c, 5);
  AttentionOutputs expected = problem.reference();
  for (const flash::cpu::Kernels* kernels : all_kernels()) {
    const std::string isa = kernels->isa;
    if (isa != "soft_tiles" && isa != "amx") continue;
    AttentionOutputs actual = problem.run(*kernels);
    const PoisonTensor* pairs[][2] = {{&actual.out, &expected.out},
                                      {&actual.dq, &expected.dq},
                                      {&actual.dk, &expected.dk},
                                      {&actual.dv, &expected.dv}};
    for (const auto& [x, y] : pairs) {
      const double error = worst_error(*x, *y);
      EXPECT_GT(error, three ? 2e-6 : 0.);
      EXPECT_LT(error, three ? 1e-4 : 2e-6);
    }
  }
}

}  // namespace
}  // namespace flash_test
