// flash_attn/layer_norm.h against its formulas.
#include "flash_attn/layer_norm.h"

#include <omp.h>

#include "operator_tensor.h"

namespace flash_test {
namespace {

struct Case {
  int64_t rows, cols, gap;
  bool is_rms_norm, is_full;  // is_full: every summand, factor and output there is
  double p_dropout;
};
std::ostream& operator<<(std::ostream& os, const Case& c) {
  return os << c.rows << " x " << c.cols << ", gap " << c.gap << (c.is_rms_norm ? ", RMS" : "")
            << (c.is_full ? ", full" : "") << ", dropout " << c.p_dropout;
}
constexpr Case kCases[] = {
    {0, 8, 0, false, true, 0.},      {1, 1, 0, true, false, 0.},      {3, 3, 2, false, true, 0.},
    {2, 8, 0, true, true, 0.25},     {5, 1000, 1, false, true, 0.},   {4, 1000, 0, true, false, 0.},
    {40, 1029, 0, false, true, 0.5}, {17, 1024, 3, false, false, 0.}, {2, 5000, 0, true, true, 0.}};

constexpr double kEpsilon = 1e-5;

// The tensors of a forward and its backward; the sum x, and all gradients, are fp32 or of the
// other dtype in turn, as each tensor may be of its own.
struct Problem {
  Case c;
  OpTensor x0, x1, residual, weight, bias, weight1, bias1, colscale, rowscale;
  OpTensor out, out1, x, mean, rstd;
  OpTensor dout, dout1, dx, dx0, dx1, dresidual;
  OpTensor dweight, dbias, dweight1, dbias1, dcolscale;
  std::vector<int32_t> mask, mask1;
  std::vector<int64_t> seed{1234567, 42};
  flash_attn_tensor mask_view, mask1_view, seed_view;

  Problem(Dtype t, const Case& c)
      : c(c),
        x0(t, {c.rows, c.cols}, c.gap),
        x1(t, {c.rows, c.cols}),
        residual(t, {c.rows, c.cols}, 2 * c.gap),
        weight(t, {c.cols}),
        bias(Dtype::kFloat32, {c.cols}),
        weight1(Dtype::kFloat32, {c.cols}),
        bias1(t, {c.cols}),
        colscale(t, {c.cols}),
        rowscale(t, {c.rows}),
        out(t, {c.rows, c.cols}, c.gap),
        out1(Dtype::kFloat32, {c.rows, c.cols}),
        x(t, {c.rows, c.cols}, c.gap),
        mean(Dtype::kFloat32, {c.rows}),
        rstd(Dtype::kFloat32, {c.rows}),
        dout(t, {c.rows, c.cols}, c.gap),
        dout1(Dtype::kFloat32, {c.rows, c.cols}),
        dx(t, {c.rows, c.cols}),
        dx0(t, {c.rows, c.cols}, c.gap),
        dx1(t, {c.rows, c.cols}),
        dresidual(Dtype::kFloat32, {c.rows, c.cols}, c.gap),
        dweight(t, {c.cols}),
        dbias(Dtype::kFloat32, {c.cols}),
        dweight1(Dtype::kFloat32, {c.cols}),
        dbias1(t, {c.cols}),
        dcolscale(Dtype::kFloat32, {c.cols}),
        mask(c.rows * words(), -1),
        mask1(c.rows * words(), -1) {
    Numbers numbers(static_cast<unsigned>(c.cols));
    for (OpTensor* input : {&x0, &x1, &residual, &weight, &bias, &weight1, &bias1, &colscale,
                            &rowscale, &dout, &dout1, &dx})
      input->fill(numbers.normals());
    mask_view = {mask.data(), FLASH_ATTN_INT32,  FLASH_ATTN_CPU, 0,
                 2,           {c.rows, words()}, {words(), 1}};
    mask1_view = mask_view;
    mask1_view.data = mask1.data();
    seed_view = index_view(seed);
  }

  int64_t words() const { return (c.cols + 3) / 4; }
  const flash_attn_tensor* full(const OpTensor& x) const { return c.is_full ? x.view() : nullptr; }

  flash_attn_norm_args norm() const {
    flash_attn_norm_args args{};
    args.rowscale = full(rowscale);
    args.rowscale_const = 1.;
    args.colscale = full(colscale);
    args.weight = weight.view();
    args.bias = full(bias);
    args.weight1 = full(weight1);
    args.bias1 = full(bias1);
    args.epsilon = kEpsilon;
    args.p_dropout = c.p_dropout;
    args.rng_state = c.p_dropout > 0 ? &seed_view : nullptr;
    args.is_rms_norm = c.is_rms_norm;
    return args;
  }

  Sealed seal() {
    return Sealed({&x0,       &x1,       &residual, &weight,   &bias,     &weight1,   &bias1,
                   &colscale, &out,      &out1,     &x,        &mean,     &rstd,      &dout,
                   &dout1,    &dx,       &dx0,      &dx1,      &rowscale, &dresidual, &dweight,
                   &dbias,    &dweight1, &dbias1,   &dcolscale});
  }

  // By the mask that the forward wrote: 1 / (1 - p) or 0.
  double keep(const std::vector<int32_t>& mask, int64_t i, int64_t j) const {
    if (c.p_dropout == 0.) return 1.;
    const auto* bytes = reinterpret_cast<const unsigned char*>(mask.data() + i * words());
    return bytes[j] == 0 ? 0. : 1. / (1. - c.p_dropout);
  }
  double factor0(int64_t i, int64_t j) const {
    const double scales = c.is_full ? rowscale.get(i) * colscale.get(j) : 1.;
    return scales * keep(mask, i, j);
  }
  double sum(int64_t i, int64_t j) const {
    const double branch = x0.get(i, j) * factor0(i, j);
    return c.is_full ? branch + x1.get(i, j) * keep(mask1, i, j) + residual.get(i, j) : branch;
  }
};

// Of a row of x as it was written.
struct Row {
  double mean = 0., rstd = 0.;
};
Row statistics(const Problem& p, int64_t i) {
  double sum = 0., squares = 0.;
  for (int64_t j = 0; j < p.c.cols; ++j) sum += p.x.get(i, j);
  const double mean = p.c.is_rms_norm ? 0. : sum / static_cast<double>(p.c.cols);
  for (int64_t j = 0; j < p.c.cols; ++j) squares += std::pow(p.x.get(i, j) - mean, 2);
  return {mean, 1. / std::sqrt(squares / static_cast<double>(p.c.cols) + kEpsilon)};
}

void run_forward(Problem& p) {
  flash_attn_layer_norm_fwd_args args{};
  args.x0 = p.x0.view();
  args.x1 = p.full(p.x1);
  args.residual = p.full(p.residual);
  args.norm = p.norm();
  args.out = p.out.view();
  args.out1 = p.full(p.out1);
  args.x = p.x.view();
  args.dropout_mask = p.c.p_dropout > 0 ? &p.mask_view : nullptr;
  args.dropout_mask1 = p.c.p_dropout > 0 && p.c.is_full ? &p.mask1_view : nullptr;
  args.mean = p.c.is_rms_norm ? nullptr : p.mean.view();
  args.rstd = p.rstd.view();
  const Sealed sealed = p.seal();
  expect_ok(flash_attn_layer_norm_fwd(&args));
}

void check_forward(Problem& p) {
  run_forward(p);
  expect_elements(
      "x", p.x, [&](int64_t i, int64_t j) { return p.sum(i, j); },
      [&](int64_t i, int64_t j) {
        return std::fabs(p.x0.get(i, j) * p.factor0(i, j)) + std::fabs(p.sum(i, j)) + 4.;
      });
  std::vector<Row> rows;
  for (int64_t i = 0; i < p.c.rows; ++i) rows.push_back(statistics(p, i));
  const auto one = [](int64_t, int64_t) { return 1.; };
  expect_elements(
      "rstd", p.rstd, [&](int64_t, int64_t i) { return rows[i].rstd; },
      [&](int64_t, int64_t i) { return 4 * rows[i].rstd; });
  if (!p.c.is_rms_norm)
    expect_elements("mean", p.mean, [&](int64_t, int64_t i) { return rows[i].mean; }, one);
  const auto check_out = [&](const char* name, OpTensor& out, const OpTensor& weight,
                             const OpTensor& bias) {
    expect_elements(
        name, out,
        [&](int64_t i, int64_t j) {
          const double norm = (p.x.get(i, j) - rows[i].mean) * rows[i].rstd;
          return norm * weight.get(j) + (p.c.is_full ? bias.get(j) : 0.);
        },
        [&](int64_t i, int64_t j) {
          return 8. + std::fabs(8 * p.x.get(i, j) * rows[i].rstd * weight.get(j));
        });
  };
  check_out("out", p.out, p.weight, p.bias);
  if (p.c.is_full) check_out("out1", p.out1, p.weight1, p.bias1);
}

void run_backward(Problem& p) {
  flash_attn_layer_norm_bwd_args args{};
  args.x = p.x.view();
  args.dout = p.dout.view();
  args.dout1 = p.full(p.dout1);
  args.dx = p.full(p.dx);
  args.x0 = p.full(p.x0);
  args.mean = p.c.is_rms_norm ? nullptr : p.mean.view();
  args.rstd = p.rstd.view();
  args.norm = p.norm();
  args.dx0 = p.dx0.view();
  args.dx1 = p.full(p.dx1);
  args.dresidual = p.full(p.dresidual);
  args.dweight = p.dweight.view();
  args.dbias = p.full(p.dbias);
  args.dweight1 = p.full(p.dweight1);
  args.dbias1 = p.full(p.dbias1);
  args.dcolscale = p.full(p.dcolscale);
  const Sealed sealed = p.seal();
  expect_ok(flash_attn_layer_norm_bwd(&args));
}

// The gradient of x, row by row, and what is summed over rows.
struct Gradients {
  std::vector<double> dx, norm;
  const Problem& p;

  explicit Gradients(const Problem& p) : dx(p.c.rows * p.c.cols), norm(p.c.rows * p.c.cols), p(p) {
    for (int64_t i = 0; i < p.c.rows; ++i) make_row(i);
  }
  double g(int64_t i, int64_t j) const {
    const double of_out1 = p.c.is_full ? p.dout1.get(i, j) * p.weight1.get(j) : 0.;
    return p.dout.get(i, j) * p.weight.get(j) + of_out1;
  }
  void make_row(int64_t i) {
    const Row row = statistics(p, i);
    double mean_g = 0., mean_gx = 0.;
    const auto n = static_cast<double>(p.c.cols);
    for (int64_t j = 0; j < p.c.cols; ++j) {
      norm[i * p.c.cols + j] = (p.x.get(i, j) - row.mean) * row.rstd;
      mean_g += p.c.is_rms_norm ? 0. : g(i, j) / n;
      mean_gx += g(i, j) * norm[i * p.c.cols + j] / n;
    }
    for (int64_t j = 0; j < p.c.cols; ++j) {
      const double through = g(i, j) - mean_g - norm[i * p.c.cols + j] * mean_gx;
      dx[i * p.c.cols + j] = row.rstd * through + (p.c.is_full ? p.dx.get(i, j) : 0.);
    }
  }
  double of_x(int64_t i, int64_t j) const { return dx[i * p.c.cols + j]; }
  double norm_of(int64_t i, int64_t j) const { return norm[i * p.c.cols + j]; }
};

void check_sum(const char* name, OpTensor& actual, int64_t rows,
               const std::function<double(int64_t, int64_t)>& of_row) {
  expect_elements(
      name, actual,
      [&](int64_t, int64_t j) {
        double sum = 0.;
        for (int64_t i = 0; i < rows; ++i) sum += of_row(i, j);
        return sum;
      },
      [&](int64_t, int64_t j) {
        double sum = 8.;
        for (int64_t i = 0; i < rows; ++i) sum += 8 * std::fabs(of_row(i, j));
        return sum;
      });
}

void check_backward(Problem& p) {
  run_backward(p);
  const Gradients gradients(p);
  const auto terms = [&](int64_t i, int64_t j) {
    const double rstd = p.rstd.get(i);
    return 16 * (1 + rstd + std::fabs(gradients.of_x(i, j))) * (1 + std::fabs(p.factor0(i, j)));
  };
  expect_elements(
      "dx0", p.dx0, [&](int64_t i, int64_t j) { return gradients.of_x(i, j) * p.factor0(i, j); },
      terms);
  check_sum("dweight", p.dweight, p.c.rows,
            [&](int64_t i, int64_t j) { return p.dout.get(i, j) * gradients.norm_of(i, j); });
  if (!p.c.is_full) return;
  expect_elements(
      "dx1", p.dx1,
      [&](int64_t i, int64_t j) { return gradients.of_x(i, j) * p.keep(p.mask1, i, j); }, terms);
  expect_elements(
      "dresidual", p.dresidual, [&](int64_t i, int64_t j) { return gradients.of_x(i, j); }, terms);
  check_sum("dbias", p.dbias, p.c.rows, [&](int64_t i, int64_t j) { return p.dout.get(i, j); });
  check_sum("dweight1", p.dweight1, p.c.rows,
            [&](int64_t i, int64_t j) { return p.dout1.get(i, j) * gradients.norm_of(i, j); });
  check_sum("dbias1", p.dbias1, p.c.rows, [&](int64_t i, int64_t j) { return p.dout1.get(i, j); });
  check_sum("dcolscale", p.dcolscale, p.c.rows, [&](int64_t i, int64_t j) {
    return gradients.of_x(i, j) * p.x0.get(i, j) * p.rowscale.get(i) * p.keep(p.mask, i, j);
  });
}

class LayerNormOn : public OperatorOn {};

TEST_P(LayerNormOn, forward_and_backward_are_the_formulas_of_the_header) {
  for (const Dtype t : kDtypes)
    for (const Case& c : kCases) {
      SCOPED_TRACE(testing::Message() << flash::dtype_name(t) << " " << c);
      Problem p(t, c);
      check_forward(p);
      check_backward(p);
    }
}

TEST_P(LayerNormOn, sums_over_rows_are_the_same_for_any_number_of_threads) {
  std::vector<std::vector<unsigned char>> results;
  for (const int threads : {1, 2, 5}) {
    Problem p(Dtype::kBFloat16, {300, 130, 0, false, true, 0.});
    const int before = omp_get_max_threads();
    omp_set_num_threads(threads);
    run_forward(p);
    run_backward(p);
    omp_set_num_threads(before);
    results.push_back(p.dweight1.tensor().bytes());
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
}

TEST_P(LayerNormOn, rows_of_a_subset_are_read_and_written_where_they_lie) {
  constexpr int64_t kRows = 4, kCols = 37, kX0Rows = 6, kOutRows = 5;
  std::vector<int32_t> x0_subset{6, 0, 2, 1}, out_subset{0, 5, 3, 1};
  const auto x0_view = index_view(x0_subset), out_view = index_view(out_subset);
  OpTensor x0(Dtype::kFloat32, {kX0Rows, kCols}, 1), residual(Dtype::kFloat32, {kRows, kCols});
  OpTensor out(Dtype::kFloat32, {kOutRows, kCols}, 3), x(Dtype::kFloat32, {kRows, kCols});
  Numbers numbers(3);
  x0.fill(numbers.normals());
  residual.fill(numbers.normals());
  out.fill([] { return 77.; });
  flash_attn_layer_norm_fwd_args args{};
  args.x0 = x0.view();
  args.residual = residual.view();
  args.norm.rowscale_const = 1.;
  args.norm.x0_subset = &x0_view;
  args.norm.out_subset = &out_view;
  args.norm.is_rms_norm = 1;
  args.out = out.view();
  args.x = x.view();
  {
    const Sealed sealed({&x0, &residual, &out, &x});
    expect_ok(flash_attn_layer_norm_fwd(&args));
  }
  for (int64_t i = 0; i < kRows; ++i) {
    double squares = 0.;
    for (int64_t j = 0; j < kCols; ++j) {
      const double branch = x0_subset[i] > 0 ? x0.get(x0_subset[i] - 1, j) : 0.;
      ASSERT_NEAR(x.get(i, j), branch + residual.get(i, j), 1e-6) << i << " " << j;
      squares += x.get(i, j) * x.get(i, j) / kCols;
    }
    for (int64_t j = 0; out_subset[i] > 0 && j < kCols; ++j)
      ASSERT_NEAR(out.get(out_subset[i] - 1, j), x.get(i, j) / std::sqrt(squares), 1e-5);
  }
  for (const int64_t unnamed : {1, 3})
    for (int64_t j = 0; j < kCols; ++j) ASSERT_EQ(out.get(unnamed, j), 77.);
}

INSTANTIATE_TEST_SUITE_P(, LayerNormOn, testing::ValuesIn(operator_isas()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace flash_test
