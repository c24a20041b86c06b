// flash_attn/rotary.h against the rotation that it describes.
#include "flash_attn/rotary.h"

#include "operator_tensor.h"

namespace flash_test {
namespace {

struct Case {
  int64_t batch, seqlen, heads, d, rotary_dim, gap;
  bool interleaved, conjugate, has_fp32_tables;
};
std::ostream& operator<<(std::ostream& os, const Case& c) {
  return os << c.batch << " x " << c.seqlen << " x " << c.heads << " x " << c.d << ", rotary_dim "
            << c.rotary_dim << ", gap " << c.gap << (c.interleaved ? ", interleaved" : "")
            << (c.conjugate ? ", conjugate" : "");
}
constexpr Case kCases[] = {
    {0, 3, 2, 8, 8, 0, false, false, true},      {1, 0, 2, 8, 8, 0, true, false, false},
    {1, 1, 1, 2, 2, 0, false, true, false},      {2, 3, 1, 3, 2, 1, true, true, true},
    {2, 5, 3, 8, 8, 0, true, false, false},      {1, 4, 2, 1000, 998, 3, false, false, true},
    {1, 3, 2, 1030, 1026, 2, true, true, false}, {3, 40, 4, 64, 32, 0, false, true, false},
    {2, 33, 2, 128, 128, 5, true, false, true},  {1, 2, 2, 8, 0, 0, false, false, false}};

constexpr int64_t kTableRows = 60;

struct Problem {
  Case c;
  OpTensor x, out, cos, sin;
  std::vector<int32_t> offsets;
  flash_attn_tensor offsets_view;

  Problem(Dtype t, const Case& c)
      : c(c),
        x(t, {c.batch, c.seqlen, c.heads, c.d}, c.gap),
        out(t, {c.batch, c.seqlen, c.heads, c.d}, 2 * c.gap),
        cos(c.has_fp32_tables ? Dtype::kFloat32 : t, {kTableRows, c.rotary_dim / 2}, c.gap),
        sin(c.has_fp32_tables ? Dtype::kFloat32 : t, {kTableRows, c.rotary_dim / 2}) {
    Numbers numbers(static_cast<unsigned>(c.d));
    for (OpTensor* input : {&x, &cos, &sin}) input->fill(numbers.normals());
    for (int64_t i = 0; i < c.batch; ++i)
      offsets.push_back(static_cast<int32_t>(numbers.below(kTableRows - c.seqlen)));
    offsets_view = index_view(offsets);
  }

  flash_attn_rotary_args args(const OpTensor& to) const {
    flash_attn_rotary_args args{};
    args.x = x.view();
    args.out = to.view();
    args.cos = cos.view();
    args.sin = sin.view();
    args.seqlen_offsets = &offsets_view;
    args.interleaved = c.interleaved;
    args.conjugate = c.conjugate;
    return args;
  }
  void run(OpTensor& to) {
    const auto args = this->args(to);
    const Sealed sealed({&x, &out, &cos, &sin});
    expect_ok(flash_attn_rotary(&args));
  }
};

using Index = PoisonTensor::Index;

// What `x` becomes at an index: the pair's other element is `partner` away.
double turned(Problem& p, const Index& at) {
  const int64_t j = at[3], half = p.c.rotary_dim / 2;
  if (j >= p.c.rotary_dim) return p.x.tensor().get(at);
  const int64_t pair = p.c.interleaved ? j / 2 : j % half;
  const bool is_first = p.c.interleaved ? j % 2 == 0 : j < half;
  Index other = at;
  other[3] += (is_first ? 1 : -1) * (p.c.interleaved ? 1 : half);
  const int64_t position = p.offsets[at[0]] + at[1];
  const double sign = (is_first ? -1. : 1.) * (p.c.conjugate ? -1. : 1.);
  return p.x.tensor().get(at) * p.cos.get(position, pair) +
         sign * p.x.tensor().get(other) * p.sin.get(position, pair);
}

class RotaryOn : public OperatorOn {};

TEST_P(RotaryOn, pairs_are_turned_and_the_rest_stays) {
  for (const Dtype t : kDtypes)
    for (const Case& c : kCases) {
      SCOPED_TRACE(testing::Message() << flash::dtype_name(t) << " " << c);
      Problem p(t, c);
      std::vector<double> expected;
      p.x.tensor().for_each([&](const Index& at) { expected.push_back(turned(p, at)); });
      p.run(p.out);
      size_t next = 0;
      p.out.tensor().for_each([&](const Index& at) {
        const double value = expected[next++];
        ASSERT_NEAR(p.out.tensor().get(at), value, rounding(t, value, 16.));
      });
      EXPECT_TRUE(p.out.tensor().untouched_between_elements());
      p.run(p.x);  // in place: the same
      p.x.tensor().for_each(
          [&](const Index& at) { ASSERT_EQ(p.x.tensor().get(at), p.out.tensor().get(at)); });
      EXPECT_TRUE(p.x.tensor().untouched_between_elements());
    }
}

TEST_P(RotaryOn, packed_sequences_with_keys_of_other_heads_and_tables) {
  for (const Dtype t : kDtypes) {
    std::vector<int64_t> cu_seqlens{0, 4, 4, 9};
    const auto cu_view = index_view(cu_seqlens);
    constexpr int64_t kTotal = 11, kDim = 24, kPairs = 9;
    OpTensor x(t, {kTotal, 3, kDim}, 1), out(t, {kTotal, 3, kDim}), k(t, {kTotal, 2, kDim});
    OpTensor k_out(t, {kTotal, 2, kDim}, 2);
    OpTensor cos(t, {8, kPairs}), sin(t, {8, kPairs}), cos_k(t, {8, kPairs}), sin_k(t, {8, kPairs});
    Numbers numbers(5);
    for (OpTensor* input : {&x, &k, &cos, &sin, &cos_k, &sin_k}) input->fill(numbers.normals());
    for (OpTensor* output : {&out, &k_out}) output->fill([] { return 5.; });
    flash_attn_rotary_args args{};
    args.x = x.view();
    args.out = out.view();
    args.k = k.view();
    args.k_out = k_out.view();
    args.cos = cos.view();
    args.sin = sin.view();
    args.cos_k = cos_k.view();
    args.sin_k = sin_k.view();
    args.seqlen_offset = 3;
    args.cu_seqlens = &cu_view;
    args.max_seqlen = 5;
    {
      const Sealed sealed({&x, &out, &k, &k_out, &cos, &sin, &cos_k, &sin_k});
      expect_ok(flash_attn_rotary(&args));
    }
    const auto check = [&](OpTensor& in, OpTensor& to, const OpTensor& cos, const OpTensor& sin) {
      in.tensor().for_each([&](const Index& at) {
        const int64_t token = at[1], j = at[3];
        Index other = at;
        other[3] += j < kPairs ? kPairs : -kPairs;
        double value = in.tensor().get(at);
        if (j < 2 * kPairs && token < 9) {
          const int64_t position = 3 + token - (token < 4 ? 0 : 4);
          value = value * cos.get(position, j % kPairs) +
                  (j < kPairs ? -1 : 1) * in.tensor().get(other) * sin.get(position, j % kPairs);
        }
        ASSERT_NEAR(to.tensor().get(at), value, rounding(t, value, 16.)) << token << " " << j;
      });
      EXPECT_TRUE(to.tensor().untouched_between_elements());
    };
    check(x, out, cos, sin);
    check(k, k_out, cos_k, sin_k);
  }
}

TEST_P(RotaryOn, a_position_beyond_the_tables_is_an_error_and_nothing_is_written) {
  Problem p(Dtype::kFloat32, {2, 5, 1, 8, 8, 0, false, false, false});
  p.offsets[1] = static_cast<int32_t>(kTableRows) - 4;
  const std::vector<unsigned char> before = p.out.tensor().bytes();
  const auto args = p.args(p.out);
  EXPECT_EQ(flash_attn_rotary(&args), FLASH_ATTN_INVALID_ARGUMENT);
  EXPECT_NE(std::string(flash_attn_last_error()).find("seqlen_offsets"), std::string::npos);
  EXPECT_EQ(p.out.tensor().bytes(), before);
}

INSTANTIATE_TEST_SUITE_P(, RotaryOn, testing::ValuesIn(operator_isas()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace flash_test
