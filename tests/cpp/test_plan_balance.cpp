// How evenly the CPU backend's plans load 2 to 192 threads: simulated, as each thread takes the
// next task once it is free. Work is counted in visible scores.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <ostream>
#include <queue>
#include <string>
#include <vector>

#include "cpu/plan.h"

namespace flash_test {
namespace {

using flash::cpu::FwdTask;

constexpr flash::cpu::FwdTile kTile{24, 192, 480, {16, 64, 8}};  // head dim 128 with AVX2
constexpr int kChunkKeys = 192, kBlockRows = 96;
constexpr int kThreads[] = {2, 8, 64, 192};

struct Shape {
  std::string name;
  std::vector<int> seqlens_q, seqlens_k;
  int h, h_k;
  int left, right;
};

std::ostream& operator<<(std::ostream& os, const Shape& x) { return os << x.name; }

class Problem {
 public:
  explicit Problem(const Shape& shape) : shape_(shape) {
    for (int n : shape.seqlens_q) cu_seqlens_q_.push_back(cu_seqlens_q_.back() + n);
    for (int n : shape.seqlens_k) cu_seqlens_k_.push_back(cu_seqlens_k_.back() + n);
    params.b = static_cast<int64_t>(shape.seqlens_q.size());
    params.h = shape.h;
    params.h_k = shape.h_k;
    params.d = params.d_v = 128;
    params.window_left = shape.left;
    params.window_right = shape.right;
    params.cu_seqlens_q = cu_seqlens_q_.data();
    params.cu_seqlens_k = cu_seqlens_k_.data();
  }
  Problem(const Problem&) = delete;

  // Scores of rows [row, row_end) with keys [key, key_end).
  double scores(int batch, int row, int row_end, int key, int key_end) const {
    const int group = shape_.h / shape_.h_k;
    const flash::Mask mask = mask_of(params, sequence(params, batch));
    double sum = 0;
    for (; row < row_end; ++row) {
      const flash::KeyRange seen = mask.keys(row / group);
      sum += std::max(0, std::min(seen.end, key_end) - std::max(seen.begin, key));
    }
    return sum;
  }
  int rows(int batch) const { return shape_.seqlens_q[batch] * (shape_.h / shape_.h_k); }

  flash::Flash_bwd_params params;

 private:
  const Shape& shape_;
  std::vector<int32_t> cu_seqlens_q_ = {0}, cu_seqlens_k_ = {0};
};

// When threads are free.
class Threads {
 public:
  explicit Threads(int count) : free_(std::greater<>(), std::vector<double>(count, 0.)) {}
  double take() {
    const double start = free_.top();
    free_.pop();
    return start;
  }
  void give_back(double end) {
    free_.push(end);
    last_ = std::max(last_, end);
  }
  double last() const { return last_; }

 private:
  std::priority_queue<double, std::vector<double>, std::greater<>> free_;
  double last_ = 0;
};

struct Balance {
  double last_end;  // over the mean work of a thread
  double longest;   // task, over the mean
  size_t tasks;
};

Balance forward_balance(const Problem& problem, int threads) {
  const flash::cpu::FwdPlan plan = flash::cpu::plan_fwd({problem.params, {}}, kTile, threads);
  Threads pool(threads);
  double total = 0, longest = 0;
  for (const FwdTask& t : plan.tasks) {
    const double work =
        t.heads * problem.scores(t.batch, t.row_begin, t.row_end, t.key_begin, t.key_end);
    pool.give_back(pool.take() + work);
    total += work;
    longest = std::max(longest, work);
  }
  return {pool.last() * threads / total, longest * threads / total, plan.tasks.size()};
}

// A chunk's work on a block of rows: S, dP, dK and dV at any time, dQ once the chunks before it
// have added theirs.
Balance backward_balance(const Problem& problem, int threads) {
  const flash::cpu::BwdPlan plan = flash::cpu::plan_bwd(problem.params, kChunkKeys, threads);
  Threads pool(threads);
  std::map<std::pair<int, int>, double> dq_end;  // of (head, block)
  std::vector<double> head_end(plan.heads.size(), 0.);
  double total = 0, longest = 0;
  for (const flash::cpu::BwdTask& task : plan.tasks) {
    const flash::cpu::BwdHead& head = plan.heads[task.head];
    double time = pool.take(), work = 0;
    if (task.head >= plan.wave_heads) time = std::max(time, head_end[task.head - plan.wave_heads]);
    const int rows = problem.rows(head.batch), key = task.chunk * kChunkKeys;
    for (int block = (rows - 1) / kBlockRows; block >= 0; --block) {
      const double scores =
          problem.scores(head.batch, block * kBlockRows, std::min(rows, (block + 1) * kBlockRows),
                         key, key + kChunkKeys);
      if (scores == 0) continue;
      double& end = dq_end[{task.head, block}];
      time = std::max(time + .8 * scores, end) + .2 * scores;
      end = time;
      work += scores;
    }
    head_end[task.head] = std::max(head_end[task.head], time);
    pool.give_back(time);
    total += work;
    longest = std::max(longest, work);
  }
  return {pool.last() * threads / total, longest * threads / total, plan.tasks.size()};
}

const std::vector<int> kRagged = {17, 3000, 128, 900, 40, 1500, 64, 700, 100, 512, 300, 200};

std::vector<Shape> shapes() {
  return {
      {"dense", {2048}, {2048}, 8, 8, -1, -1},
      {"dense_one_head", {8192}, {8192}, 1, 1, -1, -1},
      {"causal", {2048}, {2048}, 8, 8, -1, 0},
      {"causal_one_head", {8192}, {8192}, 1, 1, -1, 0},
      {"causal_gqa", {8192}, {8192}, 32, 8, -1, 0},
      {"causal_batch", {2048, 2048, 2048, 2048}, {2048, 2048, 2048, 2048}, 32, 8, -1, 0},
      {"window", {8192}, {8192}, 8, 8, 1024, 0},
      {"short", std::vector<int>(64, 128), std::vector<int>(64, 128), 8, 8, -1, 0},
      {"ragged_causal", kRagged, kRagged, 16, 16, -1, 0},
      {"ragged_gqa", kRagged, kRagged, 16, 4, -1, -1},
  };
}

std::vector<Shape> decode_shapes() {
  return {
      {"decode", {1}, {32768}, 32, 8, -1, 0},
      {"decode_batch", std::vector<int>(64, 1), std::vector<int>(64, 8192), 32, 8, -1, 0},
      {"decode_ragged", std::vector<int>(12, 1), kRagged, 32, 8, -1, 0},
  };
}

std::string name_of(const testing::TestParamInfo<Shape>& info) { return info.param.name; }

// Parts of the keys and chunks have lengths of their own, whatever the threads. Where that makes
// fewer than 8 tasks for each thread, no more is asked than that of Graham's bound for independent
// tasks: the last thread ends one task after the mean.
double limit(const Balance& x, int threads) {
  return x.tasks < size_t{8} * threads ? std::max(1.15, 1. + x.longest) : 1.15;
}

class PlanBalance : public testing::TestWithParam<Shape> {};
INSTANTIATE_TEST_SUITE_P(Shapes, PlanBalance, testing::ValuesIn(shapes()), name_of);

TEST_P(PlanBalance, Forward) {
  const Problem problem(GetParam());
  for (int threads : kThreads) {
    const Balance x = forward_balance(problem, threads);
    EXPECT_LE(x.last_end, 1.15) << threads << " threads, " << x.tasks << " tasks";
  }
}

TEST_P(PlanBalance, Backward) {
  const Problem problem(GetParam());
  for (int threads : kThreads) {
    const Balance x = backward_balance(problem, threads);
    EXPECT_LE(x.last_end, limit(x, threads)) << threads << " threads, " << x.tasks << " tasks";
  }
}

class DecodePlanBalance : public testing::TestWithParam<Shape> {};
INSTANTIATE_TEST_SUITE_P(Shapes, DecodePlanBalance, testing::ValuesIn(decode_shapes()), name_of);

TEST_P(DecodePlanBalance, Forward) {
  const Problem problem(GetParam());
  for (int threads : kThreads) {
    const Balance x = forward_balance(problem, threads);
    EXPECT_LE(x.last_end, limit(x, threads)) << threads << " threads, " << x.tasks << " tasks";
  }
}

}  // namespace
}  // namespace flash_test
