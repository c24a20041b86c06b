// flash_attn/activations.h against the definitions of its functions.
#include "flash_attn/activations.h"

#include <omp.h>

#include "operator_tensor.h"

namespace flash_test {
namespace {

struct ValueAndSlope {
  double value, slope;
};

double sigmoid(double x) { return 1. / (1. + std::exp(-x)); }

ValueAndSlope function_at(int which, double x) {
  switch (which) {
    case FLASH_ATTN_GELU_TANH: {
      const double c = std::sqrt(2. / M_PI), t = std::tanh(c * (x + 0.044715 * x * x * x));
      return {x / 2 * (1 + t), (1 + t) / 2 + x / 2 * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)};
    }
    case FLASH_ATTN_RELU:
      return {std::max(x, 0.), x > 0 ? 1. : 0.};
    case FLASH_ATTN_SQRELU:
      return {x > 0 ? x * x : 0., x > 0 ? 2 * x : 0.};
    case FLASH_ATTN_SILU:
      return {x * sigmoid(x), sigmoid(x) * (1 + x * (1 - sigmoid(x)))};
    default:
      return {sigmoid(x), sigmoid(x) * (1 - sigmoid(x))};
  }
}

struct Shape {
  int64_t rows, cols, gap;
  bool has_bias, has_gate;
};
std::ostream& operator<<(std::ostream& os, const Shape& s) {
  return os << s.rows << " x " << s.cols << ", gap " << s.gap << (s.has_bias ? ", bias" : "")
            << (s.has_gate ? ", gate" : "");
}
constexpr Shape kShapes[] = {
    {0, 8, 0, true, true},     {3, 0, 0, true, false},    {1, 1, 0, false, false},
    {5, 3, 2, true, true},     {2, 8, 0, false, true},    {3, 1000, 0, true, false},
    {2, 1027, 5, false, true}, {20, 1024, 0, true, true}, {1, 17000, 1, true, false}};

// The tensors of a forward and a backward.
struct Problem {
  Shape s;
  int which;
  OpTensor x, bias, y, dout, out, dx, dy, dbias;

  Problem(Dtype t, const Shape& s, int which)
      : s(s),
        which(which),
        x(t, {s.rows, s.cols}, s.gap),
        bias(t, {s.cols}),
        y(t, {s.rows, s.cols}, 2 * s.gap),
        dout(t, {s.rows, s.cols}),
        out(t, {s.rows, s.cols}, s.gap),
        dx(t, {s.rows, s.cols}, 3 * s.gap),
        dy(t, {s.rows, s.cols}),
        dbias(Dtype::kFloat32, {s.cols}) {
    Numbers numbers(static_cast<unsigned>(7 + which));
    for (OpTensor* input : {&x, &bias, &y, &dout}) input->fill(numbers.normals());
  }

  const flash_attn_tensor* given_bias() const { return s.has_bias ? bias.view() : nullptr; }
  const flash_attn_tensor* given_y() const { return s.has_gate ? y.view() : nullptr; }
  double input(int64_t i, int64_t j) const { return x.get(i, j) + (s.has_bias ? bias.get(j) : 0.); }
  double gate(int64_t i, int64_t j) const { return s.has_gate ? y.get(i, j) : 1.; }
  ValueAndSlope at(int64_t i, int64_t j) const { return function_at(which, input(i, j)); }
  // Of the summands of a function and its slope.
  double terms(int64_t i, int64_t j, double factors) const {
    const double x = std::fabs(input(i, j));
    return (1 + x + x * x) * std::fabs(factors);
  }

  Sealed seal() { return Sealed({&x, &bias, &y, &dout, &out, &dx, &dy, &dbias}); }
};

flash_attn_activation_bwd_args backward_of(const Problem& p) {
  flash_attn_activation_bwd_args args{};
  args.dout = p.dout.view();
  args.x = p.x.view();
  args.bias = p.given_bias();
  args.y = p.given_y();
  args.activation = p.which;
  args.dx = p.dx.view();
  args.dy = p.s.has_gate ? p.dy.view() : nullptr;
  args.dbias = p.s.has_bias ? p.dbias.view() : nullptr;
  return args;
}

void check_forward(Problem& p) {
  flash_attn_activation_fwd_args args{};
  args.x = p.x.view();
  args.bias = p.given_bias();
  args.y = p.given_y();
  args.activation = p.which;
  args.out = p.out.view();
  {
    const Sealed sealed = p.seal();
    expect_ok(flash_attn_activation_fwd(&args));
  }
  expect_elements(
      "out", p.out, [&](int64_t i, int64_t j) { return p.at(i, j).value * p.gate(i, j); },
      [&](int64_t i, int64_t j) { return p.terms(i, j, p.gate(i, j)); });
}

void check_backward(Problem& p) {
  const auto args = backward_of(p);
  {
    const Sealed sealed = p.seal();
    expect_ok(flash_attn_activation_bwd(&args));
  }
  const auto dx = [&](int64_t i, int64_t j) {
    return p.dout.get(i, j) * p.gate(i, j) * p.at(i, j).slope;
  };
  const auto terms_of_dx = [&](int64_t i, int64_t j) {
    return p.terms(i, j, p.dout.get(i, j) * p.gate(i, j));
  };
  expect_elements("dx", p.dx, dx, terms_of_dx);
  const auto sum_of = [&](const auto& f, int64_t j) {
    double sum = 0.;
    for (int64_t i = 0; i < p.s.rows; ++i) sum += f(i, j);
    return sum;
  };
  if (p.s.has_gate)
    expect_elements(
        "dy", p.dy, [&](int64_t i, int64_t j) { return p.dout.get(i, j) * p.at(i, j).value; },
        [&](int64_t i, int64_t j) { return p.terms(i, j, p.dout.get(i, j)); });
  if (p.s.has_bias)
    expect_elements(
        "dbias", p.dbias, [&](int64_t, int64_t j) { return sum_of(dx, j); },
        [&](int64_t, int64_t j) { return sum_of(terms_of_dx, j); });
}

class ActivationsOn : public OperatorOn {};

TEST_P(ActivationsOn, forward_and_backward_are_the_functions_of_the_header) {
  for (const Dtype t : kDtypes)
    for (const Shape& shape : kShapes)
      for (int which = 0; which < 5; ++which) {
        SCOPED_TRACE(testing::Message()
                     << flash::dtype_name(t) << " " << shape << ", function " << which);
        Problem p(t, shape, which);
        check_forward(p);
        check_backward(p);
      }
}

TEST_P(ActivationsOn, gradient_of_the_bias_is_the_same_for_any_number_of_threads) {
  std::vector<std::vector<unsigned char>> results;
  for (const int threads : {1, 2, 5}) {
    Problem p(Dtype::kBFloat16, {300, 1030, 0, true, false}, FLASH_ATTN_GELU_TANH);
    const auto args = backward_of(p);
    const int before = omp_get_max_threads();
    omp_set_num_threads(threads);
    expect_ok(flash_attn_activation_bwd(&args));
    omp_set_num_threads(before);
    results.push_back(p.dbias.tensor().bytes());
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
}

TEST_P(ActivationsOn, a_result_may_lie_where_an_input_does) {
  Problem apart(Dtype::kFloat16, {7, 1001, 3, false, true}, FLASH_ATTN_SILU);
  Problem in_place(Dtype::kFloat16, {7, 1001, 3, false, true}, FLASH_ATTN_SILU);
  auto args = backward_of(apart);
  expect_ok(flash_attn_activation_bwd(&args));
  args = backward_of(in_place);
  args.dx = in_place.x.view();
  args.dy = in_place.y.view();
  expect_ok(flash_attn_activation_bwd(&args));
  for (int64_t i = 0; i < 7; ++i)
    for (int64_t j = 0; j < 1001; ++j) {
      ASSERT_EQ(apart.dx.get(i, j), in_place.x.get(i, j)) << i << " " << j;
      ASSERT_EQ(apart.dy.get(i, j), in_place.y.get(i, j)) << i << " " << j;
    }
}

INSTANTIATE_TEST_SUITE_P(, ActivationsOn, testing::ValuesIn(operator_isas()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace flash_test
