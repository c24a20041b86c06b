// A program that embeds libflash_attn: causal attention of 4 tokens with 2 heads of dimension 8.
#include <flash_attn/flash_attn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <vector>

// A contiguous fp32 tensor over x.
flash_attn_tensor view(std::vector<float>& x, std::initializer_list<int64_t> shape) {
  flash_attn_tensor t{.data = x.data(), .dtype = FLASH_ATTN_FLOAT32, .device_type = FLASH_ATTN_CPU};
  t.ndim = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), t.shape);
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; stride *= t.shape[i--]) t.stride[i] = stride;
  return t;
}

int main() {
  const int64_t b = 1, s = 4, h = 2, d = 8;
  std::vector<float> q(b * s * h * d), k(q), v(q), out(q), softmax_lse(b * h * s);
  for (size_t i = 0; i < v.size(); ++i)
    v[i] = static_cast<float>(i / (h * d));  // the token's index

  auto tq = view(q, {b, s, h, d}), tk = view(k, {b, s, h, d}), tv = view(v, {b, s, h, d});
  auto tout = view(out, {b, s, h, d}), tlse = view(softmax_lse, {b, h, s});
  flash_attn_fwd_args args{.q = &tq, .k = &tk, .v = &tv, .out = &tout, .softmax_lse = &tlse};
  args.score.softmax_scale = 1 / std::sqrt(static_cast<double>(d));
  args.score.window_left = args.score.window_right = -1;  // no limit
  args.score.is_causal = 1;
  if (flash_attn_mha_fwd(&args) != FLASH_ATTN_OK) {
    std::fprintf(stderr, "%s\n", flash_attn_last_error());
    return 1;
  }

  // All scores are equal: token i takes the mean of tokens 0..i, i / 2, and its lse is log(i + 1).
  for (int i = 0; i < s; ++i) {
    std::printf("token %d: out %g, lse %g\n", i, out[i * h * d], softmax_lse[i]);
  }
  return 0;
}
