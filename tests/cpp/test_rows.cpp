// rows.h on every instruction set: rows of the caller's tensors to fp32 and back, and nothing
// beside them.
#include <cstring>
#include <random>

#include "float_format.h"
#include "isa_probe.h"

namespace flash_test {
namespace {

constexpr flash::Dtype kDtypes[] = {flash::Dtype::kFloat16, flash::Dtype::kBFloat16,
                                    flash::Dtype::kFloat32};
constexpr unsigned char kGuard = 0xa7;

class Rows : public PerIsa {
 protected:
  // f(dtype, length) for lengths around multiples of the vector width.
  template <class F>
  void for_rows(F f) const {
    for (flash::Dtype t : kDtypes)
      for (int n = 0; n <= 2 * isa().width + 1; ++n) {
        SCOPED_TRACE(testing::Message() << "dtype " << static_cast<int>(t) << ", length " << n);
        f(t, n);
      }
  }
};
INSTANTIATE_TEST_SUITE_P(Isa, Rows, testing::ValuesIn(isa_probes()), isa_name);

uint32_t code_at(const unsigned char* bytes, flash::Dtype t, int i) {
  uint32_t code = 0;
  std::memcpy(&code, bytes + i * flash::dtype_bytes(t), flash::dtype_bytes(t));
  return code;
}

// n elements of random values in a heap block of exactly their size: the address sanitizer sees
// any access beyond.
std::vector<unsigned char> random_row(flash::Dtype t, int n, std::vector<double>* values) {
  static std::mt19937 rng(5);
  std::normal_distribution<double> normal;
  std::vector<unsigned char> bytes(n * flash::dtype_bytes(t));
  values->resize(n);
  for (int i = 0; i < n; ++i) {
    const uint32_t code = format_of(t).encode(normal(rng));
    std::memcpy(bytes.data() + i * flash::dtype_bytes(t), &code, flash::dtype_bytes(t));
    (*values)[i] = format_of(t).decode(code);
  }
  return bytes;
}

TEST_P(Rows, ReadScalesAndPads) {
  for_rows([&](flash::Dtype t, int n) {
    std::vector<double> values;
    const std::vector<unsigned char> src = random_row(t, n, &values);
    const int width = isa().width, padded = (n + width - 1) / width * width + width;
    std::vector<float> dst(padded + 1, -7.f);
    EXPECT_TRUE(isa().read_row(t, dst.data(), src.data(), n, padded, 0.25f));
    for (int i = 0; i < n; ++i) {
      EXPECT_EQ(dst[i], static_cast<float>(values[i]) * 0.25f);
      EXPECT_EQ(isa().load_scalar(src.data(), t, i), values[i]);
    }
    for (int i = n; i < padded; ++i) EXPECT_EQ(dst[i], 0.f);
    EXPECT_EQ(dst[padded], -7.f);
  });
}

TEST_P(Rows, ReadTellsOfAnyElementThatIsNotFinite) {
  for_rows([&](flash::Dtype t, int n) {
    std::vector<double> values;
    std::vector<float> dst(n + 2 * isa().width);
    for (int i = 0; i < n; ++i) {
      for (double bad : {HUGE_VAL, -HUGE_VAL, std::nan("")}) {
        std::vector<unsigned char> src = random_row(t, n, &values);
        const uint32_t code = format_of(t).encode(bad);
        std::memcpy(src.data() + i * flash::dtype_bytes(t), &code, flash::dtype_bytes(t));
        EXPECT_FALSE(isa().read_row(t, dst.data(), src.data(), n, n, 1.f)) << bad << " at " << i;
      }
    }
  });
}

TEST_P(Rows, WriteScalesAndRounds) {
  for_rows([&](flash::Dtype t, int n) {
    std::vector<double> unused, values;
    random_row(flash::Dtype::kFloat32, n, &values);
    const std::vector<float> src(values.begin(), values.end());
    std::vector<unsigned char> dst((n + 4) * flash::dtype_bytes(t), kGuard);
    isa().write_row(t, dst.data(), src.data(), n, 3.f);
    for (int i = 0; i < n; ++i)
      EXPECT_EQ(code_at(dst.data(), t, i), format_of(t).encode(src[i] * 3.f));
    for (size_t i = n * flash::dtype_bytes(t); i < dst.size(); ++i) EXPECT_EQ(dst[i], kGuard);
  });
}

TEST_P(Rows, TailsTouchTheirElementsAlone) {
  const int width = isa().width, first = 3;
  for (flash::Dtype t : kDtypes) {
    const int bytes = flash::dtype_bytes(t);
    for (int n = 1; n < width; ++n) {
      std::vector<double> values;
      const std::vector<unsigned char> src = random_row(t, first + n, &values);
      std::vector<float> x(width);
      isa().load_tail(t, x.data(), src.data(), first, n);
      for (int i = 0; i < width; ++i) EXPECT_EQ(x[i], i < n ? values[first + i] : 0.) << n;

      std::vector<unsigned char> dst((first + width + 1) * bytes, kGuard);
      isa().store_tail(t, dst.data(), first, n, x.data());
      for (int i = 0; i < first + width + 1; ++i) {
        const bool inside = i >= first && i < first + n;
        uint32_t guard = 0;
        std::memset(&guard, kGuard, bytes);
        EXPECT_EQ(code_at(dst.data(), t, i), inside ? code_at(src.data(), t, i) : guard) << n;
      }
    }
  }
}

}  // namespace
}  // namespace flash_test
