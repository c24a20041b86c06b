// Packed bf16 operands and their products.
#include <cfloat>
#include <cmath>
#include <cstring>
#include <random>

#include "isa_probe.h"

namespace flash_test {
namespace {

class PerTile : public testing::TestWithParam<const TileProbe*> {
 protected:
  const TileProbe& tile() const { return *GetParam(); }
};
// Machines without AVX2 run none.
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(PerTile);
INSTANTIATE_TEST_SUITE_P(Tile, PerTile, testing::ValuesIn(tile_probes()),
                         [](const auto& info) { return std::string(info.param->name); });

std::vector<float> random_floats(size_t n, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(generator);
  return x;
}

float rounded_to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  u = (u + 0x7fffu + (u >> 16 & 1u)) & 0xffff0000u;
  std::memcpy(&x, &u, 4);
  return x;
}

TEST_P(PerTile, Exp2ForBf16) {
  constexpr int kCount = 1 << 14;
  std::vector<float> x(kCount), y(kCount);
  for (int i = 0; i < kCount; ++i) x[i] = -125.f + 133.f * i / kCount;
  tile().exp2_bf16(y.data(), x.data(), kCount);
  double worst = 0.;
  for (int i = 0; i < kCount; ++i)
    worst = std::max(worst, std::fabs(y[i] / std::exp2(static_cast<double>(x[i])) - 1.));
  EXPECT_LT(worst, 1.8e-7);

  std::vector<float> special(16), result(16);
  const float inputs[] = {0.f, 1.f, -7.f, 8.f, -125.f, -INFINITY, -1000.f, NAN};
  const float expected[] = {1.f, 2.f, 0x1p-7f, 256.f, 0x1p-125f, 0.f, 0.f, NAN};
  std::copy(std::begin(inputs), std::end(inputs), special.begin());
  tile().exp2_bf16(result.data(), special.data(), 16);
  for (int i = 0; i < 7; ++i) EXPECT_EQ(result[i], expected[i]) << inputs[i];
  EXPECT_TRUE(std::isnan(result[7]));
}

TEST_P(PerTile, Exp2WithoutSubnormalResults) {
  const std::vector<float> x = {-126.f, -126.001f, -130.f, -149.f, -150.f, -INFINITY, NAN, 3.f,
                                -126.f, -126.001f, -130.f, -149.f, -150.f, -INFINITY, NAN, 3.f};
  std::vector<float> y(x.size());
  tile().normal_exp2_bf16(y.data(), x.data(), static_cast<int>(x.size()));
  for (size_t i = 0; i < x.size(); i += 8) {
    EXPECT_EQ(y[i], 0x1p-126f);
    for (size_t j = 1; j < 6; ++j) EXPECT_EQ(y[i + j], 0.f) << x[j];
    EXPECT_TRUE(std::isnan(y[i + 6]));
    EXPECT_EQ(y[i + 7], 8.f);
  }
}

TEST_P(PerTile, TanhByTable) {
  constexpr int kCount = 1 << 16;
  std::vector<float> x(kCount), y(kCount);
  for (int i = 0; i < kCount; ++i) x[i] = 10.f * static_cast<float>(i - kCount / 2) / kCount;
  for (int i = 0; i < 120; ++i) x[i] = std::ldexp(i % 2 ? -1.1f : 1.3f, -i);
  for (int i = 0; i < 256; ++i)
    x[128 + i] = std::nextafter(0.125f * (i / 4), i % 4 < 2 ? -9.f : 9.f);
  tile().tanh_by_table(y.data(), x.data(), kCount);
  double worst = 0.;
  for (int i = 0; i < kCount; ++i)
    if (x[i] != 0.f) worst = std::max(worst, std::fabs(y[i] / std::tanh(double{x[i]}) - 1.));
  EXPECT_LT(worst, 3.1e-7);  // 1.3e-7 where it is not 1

  const std::vector<float> special = {0.f, 8.f, -8.f, 50.f, 1e38f, -1e38f, INFINITY, -INFINITY,
                                      NAN, 0.f, 0.f,  0.f,  0.f,   0.f,    0.f,      0.f};
  std::vector<float> result(special.size());
  tile().tanh_by_table(result.data(), special.data(), static_cast<int>(special.size()));
  EXPECT_EQ(result[0], 0.f);
  for (int i = 1; i < 8; ++i)
    EXPECT_NEAR(result[i], special[i] > 0 ? 1.f : -1.f, 3.1e-7) << special[i];
  EXPECT_TRUE(std::isnan(result[8]));
}

TEST_P(PerTile, TermsSumToTheNumber) {
  constexpr int kCount = 4096;
  std::vector<float> x = random_floats(kCount, 1);
  for (int i = 0; i < kCount; ++i) x[i] = std::ldexp(x[i], i % 160 - 80);
  x[0] = FLT_MAX;
  x[1] = -FLT_MAX;
  x[2] = 0x1.fffp127f;
  const double bounds[] = {0x1p-8, 0x1p-16, 0x1p-24};
  for (int terms = 1; terms <= 3; ++terms) {
    std::vector<float> y(static_cast<size_t>(terms) * kCount);
    tile().split(terms, y.data(), x.data(), kCount);
    for (int i = terms == 1 ? 3 : 0; i < kCount; ++i) {
      double sum = 0.;
      for (int t = 0; t < terms; ++t) {
        const float term = y[static_cast<size_t>(t) * kCount + i];
        EXPECT_EQ(term, rounded_to_bf16(term));
        sum += term;
      }
      // The largest numbers are cut, not rounded, to the first term: one bit less.
      const double bound = bounds[terms - 1] * (i < 3 ? 2. : 1.);
      ASSERT_LE(std::fabs(sum - x[i]), bound * std::fabs(x[i])) << x[i] << " in " << terms;
    }
  }
}

TEST_P(PerTile, SpecialNumbersKeepTheirMeaning) {
  std::vector<float> x(32, 1.f);  // the second half in another order
  const float inputs[] = {INFINITY, -INFINITY, NAN, -0.f};
  for (int i = 0; i < 4; ++i) x[i] = x[19 - i] = inputs[i];
  for (int terms = 1; terms <= 3; ++terms) {
    std::vector<float> y(static_cast<size_t>(terms) * 32);
    tile().split(terms, y.data(), x.data(), 32);
    for (int i = 0; i < 32; ++i) {
      if (std::isnan(x[i]))
        EXPECT_TRUE(std::isnan(y[i])) << i;
      else
        EXPECT_EQ(y[i], x[i]) << i;
      for (int t = 1; t < terms; ++t) EXPECT_EQ(y[32 * t + i], 0.f) << t << " " << i;
    }
  }
}

struct ProductShape {
  int m, n, k;
};

// Against sums in double, within what rounding operands to `terms` terms and summing in fp32 give.
void check_product(const TileProbe& probe, const ProductShape& s, int terms, bool by_rows) {
  const size_t m = s.m, n = s.n, k = s.k;
  const std::vector<float> a = random_floats(m * k, 2), b = random_floats(n * k, 3);
  const std::vector<float> before = random_floats(m * n, 4);
  std::vector<uint32_t> memory((m + n) * k * 3 / 2 + (512 << 10) / 4 + 16);
  uint32_t* aligned = memory.data();
  while (reinterpret_cast<uintptr_t>(aligned) % 64) ++aligned;
  const double bounds[] = {0x1p-7, 0x1p-15, 0x1p-21};
  for (const bool add : {false, true}) {
    std::vector<float> c = before;
    const TileMatrices x{s.m, s.n, s.k, a.data(), b.data(), c.data(), add, aligned};
    (by_rows ? probe.multiply_rows : probe.multiply_columns)(terms, x);
    double worst = 0.;
    for (size_t i = 0; i < m; ++i)
      for (size_t j = 0; j < n; ++j) {
        double sum = add ? before[i * n + j] : 0., size = std::fabs(sum);
        for (size_t l = 0; l < k; ++l) {
          const double term =
              by_rows ? double{a[l * m + i]} * b[l * n + j] : double{a[i * k + l]} * b[j * k + l];
          sum += term;
          size += std::fabs(term);
        }
        worst = std::max(worst, std::fabs(c[i * n + j] - sum) / size);
      }
    EXPECT_LT(worst, bounds[terms - 1])
        << s.m << " " << s.n << " " << s.k << ", " << terms << " terms, add " << add;
    EXPECT_GT(worst, bounds[terms - 1] / 256) << "more terms than said";
  }
}

TEST_P(PerTile, Products) {
  for (int terms = 1; terms <= 3; ++terms) {
    for (const ProductShape& s : {ProductShape{16, 32, 32}, {32, 64, 96}, {48, 96, 64}})
      check_product(tile(), s, terms, false);
    for (const ProductShape& s : {ProductShape{32, 32, 32}, {96, 64, 64}, {64, 96, 128}})
      check_product(tile(), s, terms, true);
  }
}

}  // namespace
}  // namespace flash_test
