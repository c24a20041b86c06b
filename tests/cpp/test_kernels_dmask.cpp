// S_dmask, the debugging output of dropout, on every instruction set.
#include "attention_problem.h"
#include "common/dropout.h"
#include "expect_close.h"
#include "isa_probe.h"

namespace flash_test {
namespace {

constexpr int kRounded = 128;  // both lengths are padded to multiples of it

// exp(x - largest x of the row in this block of keys and the later ones), negative where dropped.
void set_expected(const AttentionProblem& problem, int b, int h, int block, PoisonTensor& mask) {
  const AttentionHead head = problem.head(b, h);
  for (int i = 0; i < head.q.rows; ++i)
    for (int j = 0; j < head.k.rows; ++j) {
      const auto score = [&](int key) {
        double sum = 0.;
        for (int x = 0; x < head.q.columns; ++x) sum += head.q(i, x) * head.k(key, x);
        return sum * head.scale;
      };
      if (!head.sees(i, j)) continue;
      double largest = -HUGE_VAL;
      for (int key = j / block * block; key < head.k.rows; ++key)
        if (head.sees(i, key)) largest = std::max(largest, score(key));
      const double p = std::exp(score(j) - largest);
      mask.set({b, h, i, j}, head.keep(i, j) == 0. ? -p : p);
    }
}

TEST(Kernels, DmaskHoldsProbabilitiesAndSigns) {
  const struct {
    int d, block;  // the reference package's block of keys for the head dim
  } cases[] = {{16, 128}, {96, 64}, {128, 32}, {160, 64}};
  for (const auto& [d, block] : cases) {
    AttentionCase c;
    c.d = c.d_v = d;
    c.seqlens_q = {20, 20};
    c.seqlens_k = {290, 290};
    c.left = 100;
    c.right = 4;
    c.p_dropout = 0.4;
    AttentionProblem problem(c, 1);
    PoisonTensor expected(flash::Dtype::kFloat32, {2, c.h, kRounded, 3 * kRounded});
    expected.fill([] { return 0.; });
    for (int b = 0; b < 2; ++b)
      for (int h = 0; h < c.h; ++h) set_expected(problem, b, h, block, expected);
    for (const flash::cpu::Kernels* kernels : all_kernels()) {
      SCOPED_TRACE(testing::Message() << kernels->isa << " d " << d);
      PoisonTensor actual(flash::Dtype::kFloat32, expected.shape());
      AttentionOutputs outputs = problem.make_outputs(c.dtype);
      flash::Flash_bwd_params p = problem.params(outputs);
      p.s_dmask = actual.data();
      p.seqlen_q_rounded = kRounded;
      p.seqlen_k_rounded = 3 * kRounded;
      kernels->mha_fwd({p, {}});
      expect_close("s_dmask", actual, expected, tolerance(c.dtype));
      int wrong_signs = 0;
      actual.for_each([&](const PoisonTensor::Index& i) {
        wrong_signs += std::signbit(actual.get(i)) != std::signbit(expected.get(i)) &&
                       std::fabs(expected.get(i)) > 0.;
      });
      EXPECT_EQ(wrong_signs, 0);
    }
  }
}

}  // namespace
}  // namespace flash_test
