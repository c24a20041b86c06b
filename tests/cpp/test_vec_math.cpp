// simd.h and vec_math.h on every instruction set.
#include <bit>
#include <random>

#include "float_format.h"
#include "isa_probe.h"

namespace flash_test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
using Function = void (*)(float*, const float*, int);

INSTANTIATE_TEST_SUITE_P(VecMath, PerIsa, testing::ValuesIn(isa_probes()), isa_name);

std::vector<float> apply(Function f, std::vector<float> x, int width) {
  const size_t n = x.size();
  x.resize((n + width - 1) / width * width);
  std::vector<float> y(x.size());
  f(y.data(), x.data(), static_cast<int>(x.size()));
  y.resize(n);
  return y;
}

// From first to last in steps of `step`, then random numbers between.
std::vector<float> sweep(float first, float last, float step, int random) {
  std::vector<float> x;
  for (float v = first; v < last; v += step) x.push_back(v);
  std::mt19937 rng(7);
  std::uniform_real_distribution<float> uniform(first, last);
  for (int i = 0; i < random; ++i) x.push_back(uniform(rng));
  return x;
}

void expect_accurate(const std::vector<float>& x, const std::vector<float>& y, double (*f)(double),
                     double tolerance) {
  double worst = 0;
  float at = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double error = ulps(y[i], f(x[i]));
    if (!(error > worst)) continue;
    worst = error;
    at = x[i];
  }
  EXPECT_LE(worst, tolerance) << "ulp at x = " << at;
}

TEST_P(PerIsa, Exp2IsAccurate) {
  const std::vector<float> x = sweep(-126.4f, 127.4f, 0x1p-8f, 100000);
  expect_accurate(x, apply(isa().exp2, x, isa().width), std::exp2, 1.5);
  const std::vector<float> whole = sweep(-126.f, 127.5f, 1.f, 0);
  const std::vector<float> y = apply(isa().exp2, whole, isa().width);
  for (size_t i = 0; i < whole.size(); ++i) EXPECT_EQ(y[i], std::exp2(whole[i]));
}

TEST_P(PerIsa, Exp2OfTheExtremes) {
  const std::vector<float> x = {-kInf, -1e30f, -1000.f, -127.f, -126.6f, -0.f, 0.f, kNan, -kNan};
  const std::vector<float> y = apply(isa().exp2, x, isa().width);
  for (size_t i = 0; i < 5; ++i) EXPECT_EQ(y[i], 0.f) << x[i];
  EXPECT_EQ(y[5], 1.f);
  EXPECT_EQ(y[6], 1.f);
  EXPECT_TRUE(std::isnan(y[7]));
  EXPECT_TRUE(std::isnan(y[8]));
}

TEST_P(PerIsa, ExpIsAccurate) {
  const std::vector<float> x = sweep(-87.f, 88.f, 0x1p-8f, 100000);
  expect_accurate(x, apply(isa().exp, x, isa().width), std::exp, 5.);  // 2e-9 |n|, n = 126
  const std::vector<float> near_0 = sweep(-1.f, 1.f, 0x1p-14f, 100000);
  expect_accurate(near_0, apply(isa().exp, near_0, isa().width), std::exp, 1.5);
}

TEST_P(PerIsa, ExpOfTheExtremes) {
  const std::vector<float> x = {-kInf, -3e38f, -1000.f, -88.f, -0.f, 0.f, kNan, -kNan};
  const std::vector<float> y = apply(isa().exp, x, isa().width);
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(y[i], 0.f) << x[i];
  EXPECT_EQ(y[4], 1.f);
  EXPECT_EQ(y[5], 1.f);
  EXPECT_TRUE(std::isnan(y[6]));
  EXPECT_TRUE(std::isnan(y[7]));
}

TEST_P(PerIsa, TanhIsAccurate) {
  const std::vector<float> x = sweep(-11.f, 11.f, 0x1p-11f, 100000);
  expect_accurate(x, apply(isa().tanh, x, isa().width), std::tanh, 2.0);
  const std::vector<float> tiny = {1e-38f, -1e-30f, 1e-10f, -1e-5f, 1e-3f};
  expect_accurate(tiny, apply(isa().tanh, tiny, isa().width), std::tanh, 1.0);
}

TEST_P(PerIsa, TanhOfTheExtremes) {
  const std::vector<float> x = {0.f, 30.f, -30.f, 1e38f, -1e38f, kInf, -kInf, kNan};
  const std::vector<float> y = apply(isa().tanh, x, isa().width);
  EXPECT_EQ(y[0], 0.f);
  for (size_t i = 1; i < 7; ++i) EXPECT_EQ(y[i], x[i] > 0 ? 1.f : -1.f) << x[i];
  EXPECT_TRUE(std::isnan(y[7]));
}

// A multiple of the vector's width.
std::vector<float> tanh_of_half(const IsaProbe& isa, const std::vector<float>& x) {
  std::vector<float> y(2 * x.size());
  isa.tanh_of_half(y.data(), x.data(), static_cast<int>(x.size()));
  return y;
}

TEST_P(PerIsa, TanhOfHalfAndItsSlopeAreAccurate) {
  std::vector<float> x = sweep(-38.f, 38.f, 0x1p-10f, 100000);
  for (float v : {1e-37f, -1e-30f, 1e-10f, -1e-5f, 1e-3f, 0.f}) x.push_back(v);
  x.resize(x.size() / isa().width * isa().width);
  const std::vector<float> y = tanh_of_half(isa(), x);
  double value_error = 0, slope_error = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double value = std::tanh(x[i] / 2.), cosine = std::cosh(x[i] / 2.);
    if (x[i] != 0) value_error = std::max(value_error, std::abs(y[i] / value - 1));
    const double slope = y[x.size() + i] * cosine * cosine;
    slope_error = std::max(slope_error, std::abs(slope - 1));
  }
  EXPECT_LE(value_error, 2.5e-7);
  EXPECT_LE(slope_error, 6e-7);
}

TEST_P(PerIsa, TanhOfHalfOfTheExtremes) {
  const std::vector<float> x = {0.f, 60.f, -60.f, 1e38f, -1e38f, kInf, -kInf, kNan,
                                0.f, 60.f, -60.f, 1e38f, -1e38f, kInf, -kInf, -kNan};
  const std::vector<float> y = tanh_of_half(isa(), x);
  EXPECT_EQ(y[0], 0.f);
  EXPECT_EQ(y[16], 1.f);
  for (size_t i = 1; i < 7; ++i) {
    EXPECT_EQ(y[i], x[i] > 0 ? 1.f : -1.f) << x[i];
    EXPECT_TRUE(y[16 + i] >= 0.f && y[16 + i] < 2e-17f) << x[i];
  }
  EXPECT_TRUE(std::isnan(y[7]));
  EXPECT_TRUE(std::isnan(y[15]));
}

TEST_P(PerIsa, PartnersLieOneStepAway) {
  const int width = isa().width;
  std::vector<float> x(width), y(width);
  for (int i = 0; i < width; ++i) x[i] = static_cast<float>(i);
  for (int step = 1; step < width; step *= 2) {
    isa().partners(y.data(), x.data(), step);
    for (int i = 0; i < width; ++i) EXPECT_EQ(y[i], x[i ^ step]);
  }
}

// Half of the vector is added to the other half, until one element is left.
float pairwise_sum(std::vector<float> x) {
  while (x.size() > 1) {
    const size_t half = x.size() / 2;
    for (size_t i = 0; i < half; ++i) x[i] += x[i + half];
    x.resize(half);
  }
  return x[0];
}

TEST_P(PerIsa, ReductionsSeeEveryLane) {
  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  for (int lane = 0; lane < isa().width; ++lane) {
    std::vector<float> x(isa().width);
    for (float& v : x) v = normal(rng);
    EXPECT_EQ(isa().reduce_add(x.data()), pairwise_sum(x));
    x[lane] = 100.f;
    EXPECT_EQ(isa().reduce_max(x.data()), 100.f);
    std::fill(x.begin(), x.end(), -kInf);
    EXPECT_EQ(isa().reduce_max(x.data()), -kInf);
    x[lane] = -5.f;
    EXPECT_EQ(isa().reduce_max(x.data()), -5.f);
  }
}

// ------------------------------------------------------------------------------ 16-bit floats
constexpr flash::Dtype kHalves[] = {flash::Dtype::kFloat16, flash::Dtype::kBFloat16};

TEST_P(PerIsa, EveryHalfConvertsExactlyThereAndBack) {
  std::vector<uint16_t> codes(1 << 16), back(1 << 16);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint16_t>(i);
  std::vector<float> values(codes.size());
  for (flash::Dtype t : kHalves) {
    isa().load(t, values.data(), codes.data(), 1 << 16);
    isa().store(t, back.data(), values.data(), 1 << 16);
    int wrong = 0;
    for (uint32_t i = 0; i < 1 << 16; ++i) {
      const double expected = format_of(t).decode(i);
      if (std::isnan(expected)) {
        wrong += !std::isnan(values[i]) || !std::isnan(format_of(t).decode(back[i]));
      } else {
        wrong += values[i] != expected || std::signbit(values[i]) != std::signbit(expected) ||
                 back[i] != codes[i];
      }
    }
    EXPECT_EQ(wrong, 0) << "dtype " << static_cast<int>(t);
  }
}

// Random bit patterns; every half, the middle to the next one, and its neighbours.
std::vector<float> rounding_cases(flash::Dtype t) {
  std::vector<float> x;
  std::mt19937 rng(11);
  for (int i = 0; i < 1 << 16; ++i) x.push_back(std::bit_cast<float>(static_cast<uint32_t>(rng())));
  std::uniform_real_distribution<float> exponent(-28.f, 18.f);
  for (int i = 0; i < 1 << 16; ++i) x.push_back(std::exp2(exponent(rng)) * (i % 2 ? -1.f : 1.f));
  const FloatFormat& format = format_of(t);
  for (uint32_t i = 0; i < format.infinity(); ++i) {
    // Beyond the largest number the step goes on as if the exponent did.
    const double low = format.decode(i), step = low - (i > 0 ? format.decode(i - 1) : 0);
    const double high = i + 1 < format.infinity() ? format.decode(i + 1) : low + step;
    const float middle = static_cast<float>((low + high) / 2);
    for (float v : {middle, std::nextafter(middle, 0.f), std::nextafter(middle, kInf)}) {
      x.push_back(v);
      x.push_back(-v);
    }
  }
  for (float v : {0.f, -0.f, kInf, -kInf, kNan, -kNan, 0x1p-149f, 3.4e38f}) x.push_back(v);
  x.push_back(std::bit_cast<float>(0x7f800001u));  // a signalling NaN with bits that fp16 drops
  x.resize((x.size() + 15) / 16 * 16);
  return x;
}

TEST_P(PerIsa, FloatsRoundToTheNearestHalf) {
  for (flash::Dtype t : kHalves) {
    const std::vector<float> x = rounding_cases(t);
    std::vector<uint16_t> y(x.size());
    isa().store(t, y.data(), x.data(), static_cast<int>(x.size()));
    int wrong = 0;
    float example = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const bool right = std::isnan(x[i]) ? std::isnan(format_of(t).decode(y[i]))
                                          : y[i] == format_of(t).encode(x[i]);
      if (!right) example = x[i];
      wrong += !right;
    }
    EXPECT_EQ(wrong, 0) << "dtype " << static_cast<int>(t) << ", for instance " << example;
  }
}

}  // namespace
}  // namespace flash_test
