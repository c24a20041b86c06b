// Attention over a cache, on every instruction set, against the definition.
#include <omp.h>

#include "cache_problem.h"
#include "expect_close.h"
#include "isa_probe.h"

namespace flash_test {
namespace {

struct NamedCache {
  std::string name;
  CacheCase c;
};
std::ostream& operator<<(std::ostream& os, const NamedCache& x) { return os << x.c; }

std::vector<NamedCache> all_cases() {
  std::vector<NamedCache> cases;
  for (uint32_t seed = 0; seed < 40; ++seed)
    cases.push_back({"random_" + std::to_string(seed), random_cache_case(seed)});
  // Decode: one query, parts of the keys, heads that share a task.
  for (flash::Dtype dtype :
       {flash::Dtype::kFloat32, flash::Dtype::kBFloat16, flash::Dtype::kFloat16})
    for (int page_size : {0, 1, 16, 64, 256}) {
      CacheCase c;
      c.dtype = dtype;
      c.h = page_size == 64 ? 7 * 5 : 4 * 5;
      c.h_k = 5;
      c.d = c.d_v = page_size == 16 ? 72 : 64;
      c.seqlens_q = {1, 1};
      c.capacity = 1600;
      c.cached = {1590, 300};
      c.appended = 1;
      c.page_size = page_size;
      c.rotary_dim = 32;
      c.right = 0;
      cases.push_back({"decode_" + std::to_string(static_cast<int>(dtype)) + "_page_" +
                           std::to_string(page_size),
                       c});
    }
  return cases;
}

class CacheKernelsOn : public testing::TestWithParam<NamedCache> {};
INSTANTIATE_TEST_SUITE_P(All, CacheKernelsOn, testing::ValuesIn(all_cases()),
                         [](const auto& info) { return info.param.name; });

// Rounding may differ by a step where keys were rotated.
void expect_keys(const PoisonTensor& actual, const PoisonTensor& expected) {
  const double step = std::ldexp(1., -format_of(actual.dtype()).mantissa_bits);
  actual.for_each([&](const PoisonTensor::Index& i) {
    const double x = actual.get(i), y = expected.get(i);
    ASSERT_TRUE(std::isnan(y) ? std::isnan(x) : std::fabs(x - y) <= 4 * step)
        << "k_cache at " << testing::PrintToString(i) << ": " << x << ", expected " << y;
  });
  EXPECT_TRUE(actual.untouched_between_elements());
}

TEST_P(CacheKernelsOn, MatchTheDefinition) {
  const CacheCase& c = GetParam().c;
  const CacheProblem before(c, 1);
  const PoisonTensor expected_k = before.expected_k_cache();
  const PoisonTensor expected_v = before.expected_v_cache();
  PoisonTensor out(flash::Dtype::kFloat32, before.out.shape());
  PoisonTensor lse(flash::Dtype::kFloat32, before.lse.shape());
  std::vector<unsigned char> keys;  // those of these results
  for (const flash::cpu::Kernels* kernels : all_kernels()) {
    SCOPED_TRACE(kernels->isa);
    CacheProblem problem = before;
    problem.run(*kernels);
    EXPECT_TRUE(problem.v_cache.bytes() == expected_v.bytes());
    // The definition takes the keys as they are stored, which instruction sets mostly round alike.
    if (problem.k_cache.bytes() != keys) {
      keys = problem.k_cache.bytes();
      expect_keys(problem.k_cache, expected_k);
      problem.expected_outputs(out, lse);
    }
    expect_close("out", problem.out, out, tolerance(c.dtype));
    expect_close("lse", problem.lse, lse, tolerance(c.dtype));
  }
}

TEST_P(CacheKernelsOn, DoNotDependOnThreads) {
  const CacheProblem before(GetParam().c, 2);
  const int threads_before = omp_get_max_threads();
  for (const flash::cpu::Kernels* kernels : all_kernels()) {
    omp_set_num_threads(1);
    CacheProblem expected = before;
    expected.run(*kernels);
    for (int threads : {2, 4, 16}) {
      omp_set_num_threads(threads);
      CacheProblem actual = before;
      actual.run(*kernels);
      EXPECT_TRUE(actual.out.bytes() == expected.out.bytes()) << kernels->isa << threads;
      EXPECT_TRUE(actual.lse.bytes() == expected.lse.bytes()) << kernels->isa << threads;
      EXPECT_TRUE(actual.k_cache.bytes() == expected.k_cache.bytes()) << kernels->isa << threads;
    }
  }
  omp_set_num_threads(threads_before);
}

}  // namespace
}  // namespace flash_test
