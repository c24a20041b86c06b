// A server's attention over a paged KV cache: two sequences of different lengths, each step one
// call. A sequence's keys lie in pages of 16 tokens, anywhere in a pool; block_table says where.
//
// Every value is its token's place in its sequence, and all scores are equal, so that a token's
// output is the mean of the places up to its own: half of it.
#include <flash_attn/flash_attn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <vector>

namespace {

constexpr int64_t kHeads = 4, kHeadsK = 2, kHeadDim = 8;
constexpr int64_t kPages = 8, kPageSize = 16, kPagesOfSequence = 3;

// A contiguous tensor of the caller's memory.
template <typename T>
flash_attn_tensor view(std::vector<T>& x, flash_attn_dtype dtype,
                       std::initializer_list<int64_t> shape) {
  flash_attn_tensor t{.data = x.data(), .dtype = dtype, .device_type = FLASH_ATTN_CPU};
  for (const int64_t extent : shape) t.shape[t.ndim++] = extent;
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; stride *= t.shape[i--]) t.stride[i] = stride;
  return t;
}

struct Server {
  // One pool for all sequences. A model has one for each layer, and one table for all layers.
  std::vector<float> k_pages = std::vector<float>(kPages * kPageSize * kHeadsK * kHeadDim);
  std::vector<float> v_pages = k_pages;
  std::vector<int32_t> lengths{0, 0};  // tokens in the cache
  std::vector<int32_t> block_table = std::vector<int32_t>(2 * kPagesOfSequence, 0);
  std::vector<int32_t> free_pages{0, 3, 6, 1, 4, 7, 2, 5};
  int32_t pages_of[2] = {0, 0};

  // Pages for `more` tokens of each sequence.
  void reserve(int64_t more) {
    for (int s = 0; s < 2; ++s)
      while (pages_of[s] * kPageSize < lengths[s] + more) {
        block_table[s * kPagesOfSequence + pages_of[s]++] = free_pages.back();
        free_pages.pop_back();
      }
  }

  // Appends `tokens` new tokens of each sequence to the cache, and lets them attend to all before
  // them: out, [2, tokens, kHeads, kHeadDim].
  std::vector<float> step(int64_t tokens) {
    reserve(tokens);
    std::vector<float> q(2 * tokens * kHeads * kHeadDim, 0.f), out(q.size());
    std::vector<float> k(2 * tokens * kHeadsK * kHeadDim, 1.f), v(k.size());
    const auto row = static_cast<size_t>(kHeadsK * kHeadDim);
    for (size_t i = 0; i < v.size(); ++i) {
      const size_t sequence = i / row / tokens, token = i / row % tokens;
      v[i] = static_cast<float>(lengths[sequence] + token);
    }
    auto tq = view(q, FLASH_ATTN_FLOAT32, {2, tokens, kHeads, kHeadDim});
    auto tk = view(k, FLASH_ATTN_FLOAT32, {2, tokens, kHeadsK, kHeadDim}), tv = tk;
    tv.data = v.data();
    auto tout = view(out, FLASH_ATTN_FLOAT32, {2, tokens, kHeads, kHeadDim});
    auto cache = view(k_pages, FLASH_ATTN_FLOAT32, {kPages, kPageSize, kHeadsK, kHeadDim});
    auto v_cache = cache;
    v_cache.data = v_pages.data();
    auto table = view(block_table, FLASH_ATTN_INT32, {2, kPagesOfSequence});
    auto used = view(lengths, FLASH_ATTN_INT32, {2});

    flash_attn_kvcache_args args{.q = &tq, .k_cache = &cache, .v_cache = &v_cache, .k = &tk};
    args.v = &tv;
    args.out = &tout;
    args.cache_seqlens = &used;
    args.block_table = &table;
    args.score.softmax_scale = 1 / std::sqrt(static_cast<double>(kHeadDim));
    args.score.window_left = args.score.window_right = -1;  // no limit
    args.score.is_causal = 1;
    if (flash_attn_mha_fwd_kvcache(&args) != FLASH_ATTN_OK) {
      std::fprintf(stderr, "%s\n", flash_attn_last_error());
      std::exit(1);
    }
    for (int32_t& length : lengths) length += static_cast<int32_t>(tokens);
    return out;
  }
};

}  // namespace

int main() {
  Server server;
  const auto print = [&](const char* what, int64_t tokens) {
    const std::vector<float> out = server.step(tokens);
    for (int s = 0; s < 2; ++s) {
      const int64_t last = ((s + 1) * tokens - 1) * kHeads * kHeadDim;
      std::printf("%s: sequence %d has %d tokens, out %g\n", what, s, server.lengths[s], out[last]);
    }
  };
  print("prompts", 20);
  server.lengths[1] = 7;  // forgets tokens of sequence 1, as after a draft that was refused
  print("decoding", 1);
  print("decoding", 1);
  return 0;
}
