// Merging partial results, on every instruction set, against the definition.
#include <random>

#include "expect_close.h"
#include "isa_probe.h"

namespace flash_test {
namespace {

using flash::Dtype;

struct Combination {
  int splits = 4, b = 2, s = 5, h = 3, d_v = 20;
  Dtype dtype = Dtype::kFloat32;
};

class CombineProblem {
 public:
  // Each part is empty in one of three cases, its output then NaN.
  explicit CombineProblem(const Combination& c)
      : case_(c),
        out_partial_(Dtype::kFloat32, {c.splits * c.b, c.s, c.h, c.d_v}, 3),
        lse_partial_(Dtype::kFloat32, {c.splits, c.b, c.s, c.h}, 1),
        out(c.dtype, {c.b, c.s, c.h, c.d_v}, 2),
        lse(Dtype::kFloat32, {1, c.b, c.s, c.h}, 1) {
    std::mt19937 rng(9);
    std::normal_distribution<double> normal(0., 3.);
    lse_partial_.for_each([&](const PoisonTensor::Index& i) {
      const int kind = static_cast<int>(rng() % 6);
      const bool first_row = i[1] == 0 && i[2] == 0;  // whose parts are all empty
      const bool empty = kind < 2 || first_row;
      lse_partial_.set(i, !empty ? normal(rng) : kind % 2 ? HUGE_VAL : -HUGE_VAL);
      for (int x = 0; x < c.d_v && !empty; ++x) out_partial_.set(part(i, x), normal(rng));
    });
  }

  void run(const flash::cpu::Kernels& kernels, bool with_lse) {
    flash::Combine_params p;
    p.out_partial = out_partial_.floats();
    p.lse_partial = lse_partial_.floats();
    p.out_partial_stride[0] = case_.b * out_partial_.stride(0);
    for (int i = 0; i < 3; ++i) p.out_partial_stride[i + 1] = out_partial_.stride(i);
    for (int i = 0; i < 4; ++i) p.lse_partial_stride[i] = lse_partial_.stride(i);
    p.splits = case_.splits;
    p.b = case_.b;
    p.s = case_.s;
    p.h = case_.h;
    p.d_v = case_.d_v;
    p.out = out.operand();
    p.out_dtype = case_.dtype;
    if (with_lse) p.lse = lse.floats();
    for (int i = 0; i < 3; ++i) p.lse_stride[i] = lse.stride(i + 1);
    kernels.combine(p);
  }

  void expected(PoisonTensor& expected_out, PoisonTensor& expected_lse) const {
    expected_lse.for_each([&](const PoisonTensor::Index& row) {
      double sum = 0.;
      std::vector<double> o(case_.d_v, 0.);
      for (int split = 0; split < case_.splits; ++split) {
        const PoisonTensor::Index i = {split, row[1], row[2], row[3]};
        if (std::isinf(lse_partial_.get(i))) continue;
        const double weight = std::exp(lse_partial_.get(i));
        sum += weight;
        for (int x = 0; x < case_.d_v; ++x) o[x] += weight * out_partial_.get(part(i, x));
      }
      expected_lse.set(row, std::log(sum));
      for (int x = 0; x < case_.d_v; ++x)
        expected_out.set({row[1], row[2], row[3], x}, sum > 0. ? o[x] / sum : 0.);
    });
  }

 private:
  // The element of out_partial of an element of lse_partial.
  PoisonTensor::Index part(const PoisonTensor::Index& i, int x) const {
    return {i[0] * case_.b + i[1], i[2], i[3], x};
  }

  Combination case_;
  PoisonTensor out_partial_, lse_partial_;

 public:
  PoisonTensor out, lse;
};

TEST(CombineKernels, MatchTheDefinition) {
  const Combination cases[] = {
      {},
      {1, 1, 1, 1, 1, Dtype::kFloat16},
      {7, 2, 9, 2, 40, Dtype::kBFloat16},
      {128, 1, 3, 2, 576, Dtype::kFloat32},
      {3, 2, 200, 4, 64, Dtype::kFloat32},  // enough work for several threads
  };
  for (const Combination& c : cases)
    for (const flash::cpu::Kernels* kernels : all_kernels())
      for (bool with_lse : {true, false}) {
        SCOPED_TRACE(testing::Message() << kernels->isa << ", " << c.splits << " splits of "
                                        << c.d_v << " dims, lse " << with_lse);
        CombineProblem problem(c);
        problem.run(*kernels, with_lse);
        PoisonTensor out(Dtype::kFloat32, problem.out.shape());
        PoisonTensor lse(Dtype::kFloat32, problem.lse.shape());
        problem.expected(out, lse);
        expect_close("out", problem.out, out, tolerance(c.dtype));
        if (with_lse)
          expect_close("lse", problem.lse, lse, tolerance(Dtype::kFloat32));
        else
          EXPECT_TRUE(problem.lse.bytes() ==
                      PoisonTensor(Dtype::kFloat32, problem.lse.shape(), 1).bytes());
      }
}

}  // namespace
}  // namespace flash_test
