// Forward and backward of every instruction set against the definition.
#include <omp.h>

#include "attention_problem.h"
#include "expect_close.h"
#include "isa_probe.h"

namespace flash_test {
namespace {

using flash::Dtype;

struct NamedCase {
  std::string name;
  AttentionCase c;
};
std::ostream& operator<<(std::ostream& os, const NamedCase& x) { return os << x.c; }

AttentionCase dense(int sequences, int sq, int sk, int h, int h_k, int d, int d_v) {
  AttentionCase c;
  c.h = h;
  c.h_k = h_k;
  c.d = d;
  c.d_v = d_v;
  c.seqlens_q.assign(sequences, sq);
  c.seqlens_k.assign(sequences, sk);
  return c;
}
AttentionCase packed(std::vector<int> seqlens_q, std::vector<int> seqlens_k) {
  AttentionCase c;
  c.packed = true;
  c.seqlens_q = std::move(seqlens_q);
  c.seqlens_k = std::move(seqlens_k);
  return c;
}
AttentionCase with(AttentionCase c, void (*change)(AttentionCase&)) {
  change(c);
  return c;
}

std::vector<NamedCase> all_cases() {
  std::vector<NamedCase> cases = {
      {"causal_over_several_tiles",
       with(dense(1, 300, 300, 2, 2, 64, 64), [](AttentionCase& c) { c.right = 0; })},
      // Chunks of keys narrower than the rows of a tile: whole bands of rows see other chunks.
      {"window_over_narrow_chunks", with(dense(1, 200, 200, 1, 1, 256, 256),
                                         [](AttentionCase& c) {
                                           c.left = 5;
                                           c.right = 2;
                                         })},
      {"window_behind_the_last_query", with(dense(2, 20, 400, 2, 1, 32, 32),
                                            [](AttentionCase& c) {
                                              c.left = 10;
                                              c.right = 5;
                                            })},
      {"more_queries_than_keys",
       with(dense(2, 150, 40, 4, 2, 24, 16), [](AttentionCase& c) { c.right = 0; })},
      // The slots of dq pass from head to head over a sequence that has none.
      {"sequence_without_keys", packed({90, 60, 90, 5}, {400, 0, 400, 0})},
      {"sequence_without_queries", packed({0, 70, 0}, {30, 70, 0})},
      {"one_query_split_keys", with(dense(2, 1, 2500, 4, 2, 16, 16),
                                    [](AttentionCase& c) {
                                      c.has_sink = true;
                                      c.right = 0;
                                    })},
      {"wide_heads", dense(1, 20, 70, 2, 1, 576, 512)},
      {"one_dimension", dense(1, 30, 70, 2, 1, 1, 1)},
      {"sinks_of_rows_without_keys", with(dense(1, 60, 20, 2, 2, 16, 16),
                                          [](AttentionCase& c) {
                                            c.has_sink = true;
                                            c.has_dlse = true;
                                            c.right = 0;
                                          })},
      {"everything", with(packed({100, 0, 37}, {170, 20, 64}),
                          [](AttentionCase& c) {
                            c.h = 4;
                            c.left = 60;
                            c.right = 3;
                            c.softcap = 3.;
                            c.alibi_dims = 2;
                            c.has_bias = c.has_sink = c.has_dlse = true;
                            c.p_dropout = 0.2;
                          })},
  };
  for (int broadcast = 0; broadcast < 16; ++broadcast) {
    AttentionCase c = dense(2, 50, 250, 4, 2, 8, 8);
    c.has_bias = true;
    c.right = 0;
    for (int dim = 0; dim < 4; ++dim) c.bias_extents[dim] = broadcast >> dim & 1;
    cases.push_back({"bias_" + std::to_string(broadcast), c});
  }
  for (uint32_t seed = 0; seed < 40; ++seed)
    cases.push_back({"random_" + std::to_string(seed), random_case(seed)});
  return cases;
}

class KernelsOn : public testing::TestWithParam<NamedCase> {
 protected:
  ~KernelsOn() override { omp_set_num_threads(threads_before_); }
  const AttentionCase& shape() const { return GetParam().c; }

 private:
  const int threads_before_ = omp_get_max_threads();
};
INSTANTIATE_TEST_SUITE_P(All, KernelsOn, testing::ValuesIn(all_cases()),
                         [](const auto& info) { return info.param.name; });

TEST_P(KernelsOn, MatchTheDefinition) {
  AttentionProblem problem(shape(), 1);
  AttentionOutputs expected = problem.reference();
  for (const flash::cpu::Kernels* kernels : all_kernels()) {
    SCOPED_TRACE(kernels->isa);
    AttentionOutputs actual = problem.run(*kernels);
    const auto written = actual.written(shape()), wanted = expected.written(shape());
    for (size_t i = 0; i < written.size(); ++i)
      expect_close(written[i].name, *written[i].tensor, *wanted[i].tensor,
                   tolerance(shape().dtype) * std::sqrt(written[i].terms));
  }
}

// Bit by bit, which also covers the sizes of tasks: they shrink as threads grow in number.
TEST_P(KernelsOn, DoNotDependOnThreads) {
  AttentionProblem problem(shape(), 2);
  for (const flash::cpu::Kernels* kernels : all_kernels()) {
    omp_set_num_threads(1);
    AttentionOutputs expected = problem.run(*kernels);
    for (int threads : {2, 3, 4, 16}) {
      omp_set_num_threads(threads);
      AttentionOutputs actual = problem.run(*kernels);
      const auto written = actual.written(shape()), wanted = expected.written(shape());
      for (size_t i = 0; i < written.size(); ++i)
        EXPECT_TRUE(written[i].tensor->bytes() == wanted[i].tensor->bytes())
            << kernels->isa << " " << written[i].name << ", " << threads << " threads";
    }
  }
}

// Rows differ in how often a later key's score is the largest by far: in every unit of keys, in
// some, never.
TEST(Kernels, ScoresMayGrowWithTheKeys) {
  AttentionCase c = dense(1, 90, 700, 1, 1, 32, 32);
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
    c.dtype = dtype;
    AttentionProblem problem(c, 5);
    for (int i = 0; i < 90; ++i) problem.q.set({0, i, 0, 0}, i % 9 - 2);
    for (int j = 0; j < 700; ++j) problem.k.set({0, j, 0, 0}, j / 8.);
    AttentionOutputs expected = problem.reference();
    for (const flash::cpu::Kernels* kernels : all_kernels()) {
      SCOPED_TRACE(kernels->isa);
      AttentionOutputs actual = problem.run(*kernels);
      expect_close("out", actual.out, expected.out, tolerance(dtype));
      expect_close("lse", actual.lse, expected.lse, tolerance(Dtype::kFloat32));
    }
  }
}

// ----------------------------------------------------------------------------------------------
// Elements of two tensors, at places that belong together.
using Place = PoisonTensor::Index;
bool equal(const PoisonTensor& x, const Place& i, const PoisonTensor& y, const Place& j) {
  const double a = x.get(i), b = y.get(j);
  return a == b || (std::isnan(a) && std::isnan(b));
}

TEST(Kernels, SequencesDoNotDependOnTheirBatch) {
  AttentionCase c = packed({130, 0, 1, 33}, {300, 20, 1500, 64});
  c.h = 4;
  c.h_k = 2;
  c.left = 40;
  c.right = 0;
  c.alibi_dims = 2;
  c.has_bias = c.has_dlse = true;
  AttentionProblem batch(c, 3);
  for (const flash::cpu::Kernels* kernels : all_kernels()) {
    AttentionOutputs whole = batch.run(*kernels);
    for (int b = 0; b < c.sequences(); ++b) {
      SCOPED_TRACE(testing::Message() << kernels->isa << ", sequence " << b);
      AttentionProblem single = batch.alone(b);
      AttentionOutputs alone = single.run(*kernels);
      int different = 0;
      const auto compare = [&](const PoisonTensor& x, const PoisonTensor& y, auto index) {
        x.for_each([&](const Place& i) { different += !equal(x, i, y, index(i)); });
      };
      const auto of_q = [&](const Place& i) { return batch.q_index(b, i[1], i[2], i[3]); };
      const auto of_k = [&](const Place& i) { return batch.k_index(b, i[1], i[2], i[3]); };
      compare(alone.out, whole.out, of_q);
      compare(alone.dq, whole.dq, of_q);
      compare(alone.dk, whole.dk, of_k);
      compare(alone.dv, whole.dv, of_k);
      compare(alone.lse, whole.lse, [&](const Place& i) { return batch.lse_index(b, i[2], i[3]); });
      EXPECT_EQ(different, 0);
    }
  }
}

// Inputs that are not finite reach the rows that see them, and no other.
class NotFinite : public testing::Test {
 protected:
  static constexpr int kRow = 70, kKey = 90;
  const AttentionCase case_ = with(dense(1, 150, 150, 2, 1, 32, 32), [](AttentionCase& c) {
    c.left = 30;
    c.right = 0;
    c.has_dlse = true;
  });
  const AttentionProblem clean_{case_, 4};
  const AttentionHead mask_ = clean_.head(0, 0);

  // Rows of `actual` that differ from `expected` must be touched(row), and those touched must be
  // NaN if so said.
  template <class F>
  void check(const char* name, const PoisonTensor& actual, const PoisonTensor& expected, F touched,
             bool all_nan) const {
    int leaked = 0, lost = 0;
    actual.for_each([&](const Place& i) {
      if (touched(static_cast<int>(i[1])))
        lost += all_nan && !std::isnan(actual.get(i));
      else
        leaked += !equal(actual, i, expected, i);
    });
    EXPECT_EQ(leaked, 0) << name;
    EXPECT_EQ(lost, 0) << name;
  }
  bool sees(int row, int key) const { return mask_.sees(row, key); }
};

TEST_F(NotFinite, KeysAndValues) {
  for (const flash::cpu::Kernels* kernels : all_kernels()) {
    AttentionProblem problem = clean_;
    const AttentionOutputs expected = problem.run(*kernels);
    for (const double bad : {HUGE_VAL, std::nan("")}) {
      for (bool in_k : {false, true}) {
        SCOPED_TRACE(testing::Message() << kernels->isa << " " << bad << (in_k ? " k" : " v"));
        AttentionProblem spoilt = clean_;
        PoisonTensor& x = in_k ? spoilt.k : spoilt.v;
        for (int dim = 0; dim < 32; ++dim) x.set({0, kKey, 0, dim}, bad);
        const AttentionOutputs actual = spoilt.run(*kernels);
        const auto seeing = [&](int row) { return sees(row, kKey); };
        check("out", actual.out, expected.out, seeing, std::isnan(bad));
        check("dq", actual.dq, expected.dq, seeing, std::isnan(bad));
        // dk, dv of keys that share a row with the bad one.
        const auto reached = [&](int key) {
          for (int row = 0; row < 150; ++row)
            if (sees(row, kKey) && sees(row, key)) return true;
          return false;
        };
        check("dk", actual.dk, expected.dk, reached, false);
        check("dv", actual.dv, expected.dv, reached, false);
      }
    }
  }
}

TEST_F(NotFinite, QueriesAndTheirGradients) {
  for (const flash::cpu::Kernels* kernels : all_kernels()) {
    AttentionProblem problem = clean_;
    const AttentionOutputs expected = problem.run(*kernels);
    for (const double bad : {HUGE_VAL, std::nan("")}) {
      for (bool in_q : {false, true}) {
        SCOPED_TRACE(testing::Message() << kernels->isa << " " << bad << (in_q ? " q" : " dout"));
        AttentionProblem spoilt = clean_;
        PoisonTensor& x = in_q ? spoilt.q : spoilt.dout;
        for (int h = 0; h < 2; ++h)
          for (int dim = 0; dim < 32; ++dim) x.set({0, kRow, h, dim}, bad);
        const AttentionOutputs actual = spoilt.run(*kernels);
        const auto is_row = [&](int row) { return row == kRow; };
        check(
            "out", actual.out, expected.out, [&](int row) { return in_q && row == kRow; },
            std::isnan(bad));
        check("dq", actual.dq, expected.dq, is_row, std::isnan(bad));
        const auto seen = [&](int key) { return sees(kRow, key); };
        check("dk", actual.dk, expected.dk, seen, std::isnan(bad));
        check("dv", actual.dv, expected.dv, seen, std::isnan(bad));
      }
    }
  }
}

// Numbers in terms: of one that is infinite their products are inf - inf. NaN, inf and -inf stand
// where they do without AVX.
TEST(InfiniteNumbers, AreThoseOfFp32InTerms) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
    AttentionCase c = dense(1, 70, 90, 2, 1, 40, 40);
    c.dtype = dtype;
    for (const double softcap : {0., 5.}) {
      c.softcap = softcap;
      for (const int which : {0, 1, 2, 3}) {
        if (softcap > 0. && which < 2) continue;  // slopes that are 0 but for rounding, times inf
        AttentionProblem spoilt(c, 4);
        PoisonTensor* const tensors[] = {&spoilt.q, &spoilt.k, &spoilt.v, &spoilt.dout};
        for (const double bad : {HUGE_VAL, -HUGE_VAL}) {
          tensors[which]->set({0, 33, 0, 5}, bad);
          AttentionOutputs expected =
              spoilt.run(flash::cpu::kernels_of(flash::cpu::Isa::kBaseline));
          const auto wanted = expected.written(c);
          for (const flash::cpu::Kernels* kernels : all_kernels()) {
            SCOPED_TRACE(testing::Message() << kernels->isa << " " << c << " " << which << bad);
            AttentionOutputs outputs = spoilt.run(*kernels);
            const auto actual = outputs.written(c);
            for (size_t n = 0; n < actual.size(); ++n) {
              // Weights that are 0 but for the exponential's error, times inf.
              if (which == 1 && std::string(actual[n].name) == "dq") continue;
              int different = 0;
              wanted[n].tensor->for_each([&](const Place& i) {
                const double x = actual[n].tensor->get(i), y = wanted[n].tensor->get(i);
                different += std::isnan(x) != std::isnan(y) ||
                             ((std::isinf(x) || std::isinf(y)) && x != y && !std::isnan(x));
              });
              EXPECT_EQ(different, 0) << actual[n].name;
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace flash_test
