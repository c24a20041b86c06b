// The C interface called from several threads at once.
#include <atomic>
#include <thread>

#include "api_calls.h"
#include "attention_problem.h"
#include "expect_close.h"

namespace flash_test {
namespace {

flash_attn_tensor view(PoisonTensor& x, flash_attn_dtype dtype, int first_dim = 0) {
  flash_attn_tensor t{};
  t.data = x.data();
  t.dtype = dtype;
  t.device_type = FLASH_ATTN_CPU;
  t.ndim = 4 - first_dim;
  for (int i = first_dim; i < 4; ++i) {
    t.shape[i - first_dim] = x.shape()[i];
    t.stride[i - first_dim] = x.stride(i);
  }
  return t;
}

// Forward and backward of a dense fp32 problem through the C interface; its last error if it fails.
std::string call(AttentionProblem& problem, AttentionOutputs& r) {
  const flash_attn_tensor q = view(problem.q, kFp32), k = view(problem.k, kFp32),
                          v = view(problem.v, kFp32), dout = view(problem.dout, kFp32),
                          out = view(r.out, kFp32), lse = view(r.lse, kFp32, 1),
                          dq = view(r.dq, kFp32), dk = view(r.dk, kFp32), dv = view(r.dv, kFp32),
                          softmax_d = view(r.softmax_d, kFp32, 1);
  flash_attn_fwd_args fwd{};
  set_score(&fwd.score);
  fwd.score.is_causal = 1;
  fwd.q = &q;
  fwd.k = &k;
  fwd.v = &v;
  fwd.out = &out;
  fwd.softmax_lse = &lse;
  if (flash_attn_mha_fwd(&fwd) != FLASH_ATTN_OK) return flash_attn_last_error();
  flash_attn_bwd_args bwd{};
  bwd.score = fwd.score;
  bwd.dout = &dout;
  bwd.q = &q;
  bwd.k = &k;
  bwd.v = &v;
  bwd.out = &out;
  bwd.softmax_lse = &lse;
  bwd.dq = &dq;
  bwd.dk = &dk;
  bwd.dv = &dv;
  bwd.softmax_d = &softmax_d;
  if (flash_attn_mha_bwd(&bwd) != FLASH_ATTN_OK) return flash_attn_last_error();
  return "";
}

// Each thread has sizes of its own, so that scratch memory of one would not fit another.
AttentionProblem problem_of(int thread) {
  AttentionCase c;
  c.d = c.d_v = 16 + 24 * thread;
  c.seqlens_q = c.seqlens_k = {150 + 31 * thread};
  return AttentionProblem(c, thread);
}

TEST(Threads, CallsAtOnceGiveWhatCallsAloneGive) {
  constexpr int kThreads = 4, kCalls = 5;
  std::atomic<int> different{0}, failed{0};
  const auto work = [&](int thread) {
    AttentionProblem problem = problem_of(thread);
    AttentionOutputs first = problem.make_outputs(flash::Dtype::kFloat32);
    failed += !call(problem, first).empty();
    for (int i = 0; i < kCalls; ++i) {
      AttentionOutputs again = problem.make_outputs(flash::Dtype::kFloat32);
      failed += !call(problem, again).empty();
      different += again.out.bytes() != first.out.bytes() || again.dq.bytes() != first.dq.bytes() ||
                   again.dk.bytes() != first.dk.bytes() || again.dv.bytes() != first.dv.bytes();
    }
    return first;
  };
  std::vector<PoisonTensor> at_once(kThreads, PoisonTensor(flash::Dtype::kFloat32, {}));
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) threads.emplace_back([&, t] { at_once[t] = work(t).dq; });
  for (std::thread& thread : threads) thread.join();
  for (int t = 0; t < kThreads; ++t) EXPECT_TRUE(work(t).dq.bytes() == at_once[t].bytes()) << t;
  EXPECT_EQ(failed, 0);
  EXPECT_EQ(different, 0);
}

TEST(Threads, EachHasItsOwnLastError) {
  std::atomic<int> ready{0};
  std::string errors[2];
  const auto fail = [&](int thread) {
    FwdCall c = make_fwd();
    if (thread == 0)
      c.args.q = nullptr;
    else
      c.args.p_dropout = 2.;
    EXPECT_EQ(flash_attn_mha_fwd(&c.args), FLASH_ATTN_INVALID_ARGUMENT);
    ++ready;
    while (ready < 2) std::this_thread::yield();  // both have failed before either looks
    errors[thread] = flash_attn_last_error();
  };
  std::thread other(fail, 1);
  fail(0);
  other.join();
  EXPECT_NE(errors[0].find("q"), std::string::npos) << errors[0];
  EXPECT_NE(errors[1].find("p_dropout"), std::string::npos) << errors[1];
  EXPECT_EQ(errors[0].find("p_dropout"), std::string::npos) << errors[0];
}

}  // namespace
}  // namespace flash_test
