// How many instructions attention executes, for CPUs that are only emulated: Bochs' time stamp
// counter counts instructions.
//
//   run_in_bochs.sh count_instructions fwd|bwd float32|float16|bfloat16 SEQLEN HEADDIM [causal]
//
// One head, one thread. Prints instructions a vector of 16 visible scores; with AMX, the tile
// products of 16 scores keep the tile unit busy for (d + dv) / 32 cycles forward (TDPBF16PS: 16
// cycles for 16 x 16 x 32). A `rep stosb` counts once for each byte; memset and memcpy do without
// when
//
//   GLIBC_TUNABLES=glibc.cpu.x86_rep_stosb_threshold=99999999:glibc.cpu.x86_rep_movsb_threshold=99999999
#include <x86intrin.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "flash_attn/flash_attn.h"

namespace {

__attribute__((target("f16c"))) uint16_t to_fp16(float x) { return _cvtss_sh(x, 0); }

struct Tensor {
  std::vector<unsigned char> bytes;
  flash_attn_tensor view{};

  Tensor(flash_attn_dtype dtype, std::vector<int64_t> shape) {
    int64_t count = 1;
    view.ndim = static_cast<int32_t>(shape.size());
    for (int i = view.ndim - 1; i >= 0; --i) {
      view.shape[i] = shape[i];
      view.stride[i] = count;
      count *= shape[i];
    }
    view.dtype = dtype;
    view.device_type = FLASH_ATTN_CPU;
    bytes.resize(count * (dtype == FLASH_ATTN_FLOAT32 ? 4 : 2));
    view.data = bytes.data();
  }
  // Normal random numbers of variance 1/4.
  void fill(int seed) {
    std::minstd_rand bits(seed);
    std::normal_distribution<float> normal(0.f, 0.5f);
    const size_t size = view.dtype == FLASH_ATTN_FLOAT32 ? 4 : 2;
    for (size_t i = 0; i < bytes.size(); i += size) {
      const float x = normal(bits);
      const uint16_t half = to_fp16(x);
      if (view.dtype == FLASH_ATTN_FLOAT16)
        std::memcpy(&bytes[i], &half, size);
      else  // bf16 by truncation
        std::memcpy(&bytes[i], reinterpret_cast<const char*>(&x) + 4 - size, size);
    }
  }
};

[[noreturn]] void fail(const char* why) {
  std::fprintf(stderr, "%s\n", why);
  std::exit(1);
}

flash_attn_dtype dtype_of(const std::string& name) {
  if (name == "float32") return FLASH_ATTN_FLOAT32;
  if (name == "float16") return FLASH_ATTN_FLOAT16;
  if (name == "bfloat16") return FLASH_ATTN_BFLOAT16;
  fail("the dtype is float32, float16 or bfloat16");
}

void require(flash_attn_status status) {
  if (status != FLASH_ATTN_OK) fail(flash_attn_last_error());
}

}  // namespace

int main(int argc, char** argv) {
  const std::string pass = argc < 5 ? "" : argv[1];
  if (pass != "fwd" && pass != "bwd") fail("see the first lines of count_instructions.cpp");
  const bool backward = pass == "bwd", causal = argc > 5;
  if (causal && argv[5] != std::string("causal")) fail("the last argument is causal, or missing");
  const flash_attn_dtype dtype = dtype_of(argv[2]);
  const int64_t s = std::atoi(argv[3]), d = std::atoi(argv[4]);
  if (s <= 0 || d <= 0) fail("SEQLEN and HEADDIM are positive");
  const auto make = [&] { return Tensor(dtype, {1, s, 1, d}); };
  Tensor q = make(), k = make(), v = make(), out = make(), dout = make(), dq = make(), dk = make(),
         dv = make();
  Tensor lse(FLASH_ATTN_FLOAT32, {1, 1, s});
  Tensor softmax_d(FLASH_ATTN_FLOAT32, {1, 1, (s + 127) / 128 * 128});
  int seed = 1;
  for (Tensor* x : {&q, &k, &v, &dout}) x->fill(seed++);

  flash_attn_score_args score{};
  score.softmax_scale = 1. / std::sqrt(static_cast<double>(d));
  score.window_left = score.window_right = -1;
  score.is_causal = causal;
  flash_attn_fwd_args fwd{};
  flash_attn_bwd_args bwd{};
  fwd.q = bwd.q = &q.view;
  fwd.k = bwd.k = &k.view;
  fwd.v = bwd.v = &v.view;
  fwd.out = bwd.out = &out.view;
  fwd.softmax_lse = bwd.softmax_lse = &lse.view;
  fwd.score = bwd.score = score;
  bwd.dout = &dout.view;
  bwd.dq = &dq.view;
  bwd.dk = &dk.view;
  bwd.dv = &dv.view;
  bwd.softmax_d = &softmax_d.view;

  const auto run = [&] { require(backward ? flash_attn_mha_bwd(&bwd) : flash_attn_mha_fwd(&fwd)); };
  require(flash_attn_mha_fwd(&fwd));
  run();  // sets up threads and scratch
  const uint64_t begin = __rdtsc();
  run();
  const auto instructions = static_cast<double>(__rdtsc() - begin);
  const double scores = static_cast<double>(causal ? s * (s + 1) / 2 : s * s);
  std::printf("%s: %.1f instructions for 16 scores, %.3g in all\n", flash_attn_cpu_isa(),
              instructions / scores * 16, instructions);
  return 0;
}
