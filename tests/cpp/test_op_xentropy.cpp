// flash_attn/xentropy.h against its formulas.
#include "flash_attn/xentropy.h"

#include "operator_tensor.h"

namespace flash_test {
namespace {

struct Case {
  int64_t rows, cols, gap;
  double smoothing, scale, z_scale;
};
std::ostream& operator<<(std::ostream& os, const Case& c) {
  return os << c.rows << " x " << c.cols << ", gap " << c.gap << ", smoothing " << c.smoothing
            << ", scale " << c.scale << ", z-loss " << c.z_scale;
}
constexpr Case kCases[] = {{0, 8, 0, 0., 1., 0.},       {1, 1, 0, 0., 1., 0.},
                           {3, 3, 1, 0.1, 0.5, 1e-2},   {4, 8, 0, 0., 2., 1e-3},
                           {5, 1000, 3, 0.2, 1., 0.},   {2, 1027, 0, 0., 1., 1e-2},
                           {3, 5000, 2, 0.1, 0.7, 1e-2}};
constexpr int64_t kIgnored = -100;

struct Problem {
  Case c;
  OpTensor logits, state, losses, z_losses, dlosses, dlogits;
  std::vector<int64_t> labels;
  flash_attn_tensor labels_view;

  Problem(Dtype t, const Case& c)
      : c(c),
        logits(t, {c.rows, c.cols}, c.gap),
        state(Dtype::kFloat32, {c.rows, 4}),
        losses(Dtype::kFloat32, {c.rows}),
        z_losses(Dtype::kFloat32, {c.rows}),
        dlosses(Dtype::kFloat32, {c.rows}),
        dlogits(t, {c.rows, c.cols}, 2 * c.gap) {
    Numbers numbers(static_cast<unsigned>(c.cols));
    logits.fill([&] { return 3 * numbers.normal(); });
    dlosses.fill(numbers.normals());
    for (int64_t i = 0; i < c.rows; ++i)
      labels.push_back(i == 2 ? kIgnored : numbers.below(c.cols));
    for (int64_t j = 0; c.rows > 2 && j < c.cols; ++j) logits.set(2, j, NAN);  // is not read
    labels_view = index_view(labels);
  }

  double z(int64_t i, int64_t j) const { return c.scale * logits.get(i, j); }
  double lse(int64_t i) const {
    double largest = -INFINITY, sum = 0.;
    for (int64_t j = 0; j < c.cols; ++j) largest = std::max(largest, z(i, j));
    for (int64_t j = 0; j < c.cols; ++j) sum += std::exp(z(i, j) - largest);
    return largest + std::log(sum);
  }
  double loss(int64_t i) const {
    if (labels[i] == kIgnored) return 0.;
    double mean = 0.;
    for (int64_t j = 0; j < c.cols; ++j) mean += z(i, j) / static_cast<double>(c.cols);
    return lse(i) - (1 - c.smoothing) * z(i, labels[i]) - c.smoothing * mean +
           c.z_scale * lse(i) * lse(i);
  }

  flash_attn_xentropy_fwd_args forward(const flash_attn_tensor* logits) const {
    flash_attn_xentropy_fwd_args args{};
    args.logits = logits;
    args.labels = &labels_view;
    args.label_smoothing = c.smoothing;
    args.logit_scale = c.scale;
    args.lse_square_scale = c.z_scale;
    args.ignore_index = kIgnored;
    args.num_classes = c.cols;
    args.state = state.view();
    args.losses = losses.view();
    args.z_losses = z_losses.view();
    return args;
  }
  flash_attn_xentropy_bwd_args backward(const OpTensor& to) const {
    flash_attn_xentropy_bwd_args args{};
    args.dlosses = dlosses.view();
    args.logits = logits.view();
    args.labels = &labels_view;
    args.state = state.view();
    args.label_smoothing = c.smoothing;
    args.logit_scale = c.scale;
    args.lse_square_scale = c.z_scale;
    args.ignore_index = kIgnored;
    args.num_classes = c.cols;
    args.dlogits = to.view();
    return args;
  }
  Sealed seal() { return Sealed({&logits, &state, &losses, &z_losses, &dlosses, &dlogits}); }
};

void check_losses(Problem& p) {
  const auto terms = [&](int64_t, int64_t i) { return 8 * (1 + std::fabs(p.loss(i))) + 100.; };
  expect_elements("losses", p.losses, [&](int64_t, int64_t i) { return p.loss(i); }, terms);
  expect_elements(
      "z_losses", p.z_losses,
      [&](int64_t, int64_t i) {
        return p.labels[i] == kIgnored ? 0. : p.c.z_scale * p.lse(i) * p.lse(i);
      },
      terms);
}

void check_backward(Problem& p) {
  const auto args = p.backward(p.dlogits);
  {
    const Sealed sealed = p.seal();
    expect_ok(flash_attn_xentropy_bwd(&args));
  }
  std::vector<double> lses;
  for (int64_t i = 0; i < p.c.rows; ++i) lses.push_back(p.lse(i));
  expect_elements(
      "dlogits", p.dlogits,
      [&](int64_t i, int64_t j) {
        if (p.labels[i] == kIgnored) return 0.;
        const double softmax = std::exp(p.z(i, j) - lses[i]);
        const double classes = static_cast<double>(p.c.cols);
        return p.dlosses.get(i) * p.c.scale *
               (softmax * (1 + 2 * p.c.z_scale * lses[i]) -
                (j == p.labels[i] ? 1 - p.c.smoothing : 0.) - p.c.smoothing / classes);
      },
      [&](int64_t i, int64_t) { return 8 * std::fabs(p.dlosses.get(i)); });
}

class CrossEntropyOn : public OperatorOn {};

TEST_P(CrossEntropyOn, losses_and_gradients_are_the_formulas_of_the_header) {
  for (const Dtype t : kDtypes)
    for (const Case& c : kCases) {
      SCOPED_TRACE(testing::Message() << flash::dtype_name(t) << " " << c);
      Problem p(t, c);
      const auto args = p.forward(p.logits.view());
      {
        const Sealed sealed = p.seal();
        expect_ok(flash_attn_xentropy_fwd(&args));
      }
      check_losses(p);
      check_backward(p);
    }
}

TEST_P(CrossEntropyOn, classes_may_come_in_chunks) {
  for (const Dtype t : kDtypes) {
    Problem p(t, {5, 1000, 3, 0.2, 0.5, 1e-2});
    int64_t seen = 0;
    for (const int64_t count : {0, 1, 700, 299}) {
      flash_attn_tensor part = *p.logits.view();
      part.shape[1] = count;
      part.data = static_cast<char*>(part.data) + seen * flash::dtype_bytes(t);
      auto args = p.forward(&part);
      args.class_start = args.classes_before = seen;
      expect_ok(flash_attn_xentropy_fwd(&args));
      seen += count;
    }
    check_losses(p);
    check_backward(p);
  }
}

TEST_P(CrossEntropyOn, gradient_may_lie_where_the_logits_do) {
  for (const Dtype t : kDtypes) {
    Problem p(t, {4, 1001, 0, 0.1, 1., 0.});
    const auto forward = p.forward(p.logits.view());
    expect_ok(flash_attn_xentropy_fwd(&forward));
    auto backward = p.backward(p.dlogits);
    expect_ok(flash_attn_xentropy_bwd(&backward));
    backward = p.backward(p.logits);
    expect_ok(flash_attn_xentropy_bwd(&backward));
    EXPECT_EQ(p.logits.tensor().bytes(), p.dlogits.tensor().bytes());
  }
}

TEST_P(CrossEntropyOn, a_label_out_of_range_is_an_error_and_nothing_is_written) {
  Problem p(Dtype::kFloat32, {5, 8, 0, 0., 1., 0.});
  p.labels[4] = 8;
  const std::vector<unsigned char> before = p.losses.tensor().bytes();
  const auto args = p.forward(p.logits.view());
  EXPECT_EQ(flash_attn_xentropy_fwd(&args), FLASH_ATTN_INVALID_ARGUMENT);
  EXPECT_NE(std::string(flash_attn_last_error()).find("row 4"), std::string::npos);
  EXPECT_EQ(p.losses.tensor().bytes(), before);
}

INSTANTIATE_TEST_SUITE_P(, CrossEntropyOn, testing::ValuesIn(operator_isas()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace flash_test
