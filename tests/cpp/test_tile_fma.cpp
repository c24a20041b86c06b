// tile_fma.h on every instruction set: products in tiles, and the packed layouts they take.
#include <cmath>
#include <random>

#include "isa_probe.h"

namespace flash_test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kGuard = -12345.f;

class TileFma : public PerIsa {};
INSTANTIATE_TEST_SUITE_P(Isa, TileFma, testing::ValuesIn(isa_probes()), isa_name);

std::vector<float> random_floats(size_t n) {
  static std::mt19937 rng(17);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(rng);
  return x;
}

// A product with matrices of its own; C has a guard row, and guard columns behind its panels.
struct ProductCase {
  int rows, columns, k, tile_n;
  bool transposed_a;
  Start start;
  std::vector<float> a, b, c, row_scale;
  int64_t a_ld, c_ld, panel_stride;

  ProductCase(int m, int n, int sum, int panel, bool transposed, Start c_start)
      : rows(m), columns(n), k(sum), tile_n(panel), transposed_a(transposed), start(c_start) {
    const int padded = (n + tile_n - 1) / tile_n * tile_n;
    a_ld = (transposed ? m : k) + 3;
    a = random_floats(a_ld * (transposed ? k : m));
    panel_stride = static_cast<int64_t>(k + 1) * tile_n;
    b = random_floats(panel_stride * padded / tile_n + 1);
    c_ld = padded + 5;
    c = random_floats(c_ld * (m + 1));
    for (int i = 0; i <= m; ++i)
      for (int64_t j = i < m ? padded : 0; j < c_ld; ++j) c[i * c_ld + j] = kGuard;
    row_scale = random_floats(m + 64);
  }

  float& a_at(int m, int i) { return a[transposed_a ? i * a_ld + m : m * a_ld + i]; }
  float& b_at(int i, int n) { return b[n / tile_n * panel_stride + i * tile_n + n % tile_n]; }

  // Element (m, n) of the result; `size` receives the sum of the magnitudes.
  double expected(int m, int n, bool skip_zeros, double* size) {
    double sum = start == Start::kZero ? 0. : c[m * c_ld + n];
    if (start == Start::kScaleRows) sum *= row_scale[m];
    *size = std::fabs(sum);
    for (int i = 0; i < k; ++i) {
      if (skip_zeros && a_at(m, i) == 0.f) continue;
      const double term = static_cast<double>(a_at(m, i)) * b_at(i, n);
      sum += term;
      *size += std::fabs(term);
    }
    return sum;
  }

  std::vector<float> run(const IsaProbe& isa, bool skip_zeros) const {
    std::vector<float> result = c;
    isa.multiply({transposed_a, skip_zeros, rows, columns, k, a.data(), a_ld, b.data(),
                  panel_stride, tile_n, result.data(), c_ld, start, row_scale.data()});
    return result;
  }

  void check(const std::vector<float>& result, bool skip_zeros) {
    for (int m = 0; m <= rows; ++m)
      for (int64_t n = 0; n < c_ld; ++n) {
        const float actual = result[m * c_ld + n];
        if (m == rows || n >= c_ld - 5) {
          ASSERT_EQ(actual, kGuard) << "written outside C at " << m << ", " << n;
          continue;
        }
        double size;
        const double value = expected(m, static_cast<int>(n), skip_zeros, &size);
        ASSERT_NEAR(actual, value, 1e-6 * size + 1e-30) << m << ", " << n;
      }
  }
};

TEST_P(TileFma, MultipliesAnyNumberOfRows) {
  for (int rows = 1; rows <= 2 * isa().tile_m + 1; ++rows)
    for (bool transposed : {false, true})
      for (Start start : {Start::kZero, Start::kKeep, Start::kScaleRows})
        for (bool skip_zeros : {false, true})
          for (int k : {0, 1, 19}) {
            SCOPED_TRACE(testing::Message()
                         << "rows " << rows << " transposed " << transposed << " start "
                         << static_cast<int>(start) << " skip " << skip_zeros << " k " << k);
            ProductCase product(rows, isa().tile_n + 1, k, isa().tile_n, transposed, start);
            product.check(product.run(isa(), skip_zeros), skip_zeros);
            if (HasFatalFailure()) return;
          }
}

TEST_P(TileFma, ZerosHideRowsThatAreNotFinite) {
  for (bool transposed : {false, true})
    for (float bad : {kInf, -kInf, kNan}) {
      ProductCase product(isa().tile_m + 2, 2 * isa().tile_n, 9, isa().tile_n, transposed,
                          Start::kKeep);
      for (int n = 0; n < product.columns; ++n) product.b_at(4, n) = bad;
      for (int m = 1; m < product.rows; ++m) product.a_at(m, 4) = m % 2 ? 0.f : -0.f;
      const std::vector<float> result = product.run(isa(), true);
      for (int n = 0; n < product.columns; ++n) {
        EXPECT_FALSE(std::isfinite(result[n])) << "row 0 sees it";
        for (int m = 1; m < product.rows; ++m) {
          double size;
          const double value = product.expected(m, n, true, &size);
          ASSERT_NEAR(result[m * product.c_ld + n], value, 1e-6 * size) << m << ", " << n;
        }
      }
    }
}

TEST_P(TileFma, SkippingZerosChangesNoFiniteResult) {
  ProductCase product(isa().tile_m + 1, isa().tile_n, 23, isa().tile_n, false, Start::kScaleRows);
  for (int m = 0; m < product.rows; ++m) product.a_at(m, m % product.k) = 0.f;
  EXPECT_EQ(product.run(isa(), true), product.run(isa(), false));
}

// ------------------------------------------------------------------------------------ packing
struct Packed {
  int n, d, n_padded, d_padded;
  std::vector<float> rows, packed, buffer;

  Packed(int rows_given, int dims, int tile_n)
      : n(rows_given),
        d(dims),
        n_padded((n + tile_n - 1) / tile_n * tile_n),
        d_padded((d + tile_n - 1) / tile_n * tile_n),
        rows(random_floats(static_cast<size_t>(n) * d)),
        packed(static_cast<size_t>(n_padded) * d_padded + 1, kGuard),
        buffer(static_cast<size_t>(tile_n) * d_padded) {}
  float expected(int row, int dim) const {
    return row < n && dim < d ? rows[static_cast<size_t>(row) * d + dim] : 0.f;
  }
};

class Packing : public TileFma {
 protected:
  template <class F>
  void for_shapes(F f) const {
    const int tile = isa().tile_n;
    for (int n : {1, 3, tile - 1, tile, tile + 1, 3 * tile})
      for (int d : {1, 2, 4, 7, tile - 1, tile, tile + 5, 2 * tile}) {
        SCOPED_TRACE(testing::Message() << "rows " << n << " dims " << d);
        f(Packed(n, d, tile));
      }
  }
};
INSTANTIATE_TEST_SUITE_P(Isa, Packing, testing::ValuesIn(isa_probes()), isa_name);

// Panels of tile_n rows: element (dim, row) at (row / tile_n) * tile_n * d_padded + dim * tile_n +
// row % tile_n, for the d dims that the product sums over.
TEST_P(Packing, TransposedPanelsHoldRowsSideBySide) {
  for_shapes([&](Packed x) {
    const int tile = isa().tile_n;
    EXPECT_TRUE(isa().pack_transposed(x.packed.data(), x.rows.data(), x.n, x.d, x.buffer.data()));
    for (int row = 0; row < x.n_padded; ++row)
      for (int dim = 0; dim < x.d; ++dim)
        ASSERT_EQ(x.packed[row / tile * tile * x.d_padded + dim * tile + row % tile],
                  x.expected(row, dim))
            << row << ", " << dim;
    EXPECT_EQ(x.packed.back(), kGuard);
  });
}

// Panels of tile_n dims: element (row, dim) at (dim / tile_n) * tile_n * n_padded + row * tile_n +
// dim % tile_n.
TEST_P(Packing, NaturalPanelsHoldDimsSideBySide) {
  for_shapes([&](Packed x) {
    const int tile = isa().tile_n;
    EXPECT_TRUE(
        isa().pack_natural(x.packed.data(), x.rows.data(), x.n, x.n_padded, x.d, x.buffer.data()));
    for (int row = 0; row < x.n_padded; ++row)
      for (int dim = 0; dim < x.d_padded; ++dim)
        ASSERT_EQ(x.packed[dim / tile * tile * x.n_padded + row * tile + dim % tile],
                  x.expected(row, dim))
            << row << ", " << dim;
    EXPECT_EQ(x.packed.back(), kGuard);
  });
}

TEST_P(Packing, TellsOfElementsThatAreNotFinite) {
  for (float bad : {kInf, kNan}) {
    Packed x(isa().tile_n + 2, 5, isa().tile_n);
    x.rows[static_cast<size_t>(isa().tile_n) * x.d + 4] = bad;
    EXPECT_FALSE(isa().pack_transposed(x.packed.data(), x.rows.data(), x.n, x.d, x.buffer.data()));
    EXPECT_FALSE(
        isa().pack_natural(x.packed.data(), x.rows.data(), x.n, x.n_padded, x.d, x.buffer.data()));
  }
}

}  // namespace
}  // namespace flash_test
