// How the CPU backend cuts its work: every score computed once, in an order that cannot deadlock.
#include "cpu/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <vector>

namespace flash_test {
namespace {

using flash::cpu::FwdTask;
using flash::cpu::plan_bwd;

constexpr int kThreads[] = {1, 2, 8, 64, 192};
constexpr flash::cpu::FwdTile kTile{24, 64, 96};
constexpr flash::cpu::FwdTile kStreamTile{24, 64, 96, {10, 16, 3}};

// A batch of sequences; params() points into it.
struct Batch {
  std::vector<int> seqlens_q, seqlens_k;
  int h, h_k, left, right, num_splits;
  std::vector<int32_t> cu_seqlens_q, cu_seqlens_k;

  flash::Flash_bwd_params params() {
    flash::Flash_bwd_params p;
    p.b = static_cast<int64_t>(seqlens_q.size());
    p.h = h;
    p.h_k = h_k;
    p.d = p.d_v = 64;
    p.window_left = left;
    p.window_right = right;
    p.seqlen_q = *std::max_element(seqlens_q.begin(), seqlens_q.end());
    p.seqlen_k = *std::max_element(seqlens_k.begin(), seqlens_k.end());
    cu_seqlens_q = cu_seqlens_k = {0};
    for (int n : seqlens_q) cu_seqlens_q.push_back(cu_seqlens_q.back() + n);
    for (int n : seqlens_k) cu_seqlens_k.push_back(cu_seqlens_k.back() + n);
    p.cu_seqlens_q = cu_seqlens_q.data();
    p.cu_seqlens_k = cu_seqlens_k.data();
    return p;
  }
  flash::Flash_fwd_params fwd_params() { return {params(), {}, num_splits}; }
  int group() const { return h / h_k; }
  int rows(int b) const { return seqlens_q[b] * group(); }
  bool sees(int b, int row, int key) const {
    const int diagonal = row / group() + seqlens_k[b] - seqlens_q[b];
    return (left < 0 || key >= diagonal - left) && (right < 0 || key <= diagonal + right);
  }
};

Batch random_batch(std::mt19937& rng, int max_q) {
  const auto below = [&](int n) { return static_cast<int>(rng() % n); };
  Batch batch{};
  const int sequences = 1 + below(4);
  for (int b = 0; b < sequences; ++b) {
    batch.seqlens_q.push_back(below(5) == 0 ? 0 : 1 + below(max_q));
    batch.seqlens_k.push_back(below(5) == 0 ? 0 : 1 + below(300));
  }
  batch.h_k = 1 + below(2);
  batch.h = batch.h_k * (1 + below(3));
  batch.left = below(2) ? -1 : below(200);
  batch.right = below(2) ? -1 : below(50);
  batch.num_splits = below(2) ? 0 : 1 + below(8);
  return batch;
}

// The split that computes each score of one key-value head, -1 where the row does not see the key.
// Checks that exactly one task computes what is seen, and none anything twice.
std::vector<int> split_of_scores(const flash::cpu::FwdPlan& plan, const Batch& batch, int b,
                                 int head_k) {
  const int seqlen_k = batch.seqlens_k[b];
  constexpr int kNone = -1, kTwice = 1000;
  std::vector<int> x(static_cast<size_t>(batch.rows(b)) * seqlen_k, kNone);
  for (const FwdTask& t : plan.tasks) {
    if (t.batch != b || head_k < t.head_k || head_k >= t.head_k + t.heads) continue;
    for (int row = t.row_begin; row < t.row_end; ++row)
      for (int key = t.key_begin; key < t.key_end; ++key) {
        int& split = x.at(static_cast<size_t>(row) * seqlen_k + key);
        split = split == kNone ? t.split : kTwice;
      }
  }
  for (int row = 0; row < batch.rows(b); ++row)
    for (int key = 0; key < seqlen_k; ++key) {
      int& split = x[static_cast<size_t>(row) * seqlen_k + key];
      EXPECT_NE(split, kTwice) << "row " << row << " key " << key;
      if (!batch.sees(b, row, key))
        split = kNone;  // computed or not
      else if (split == kNone)
        ADD_FAILURE() << "nobody computes row " << row << " key " << key;
    }
  return x;
}

void check_coverage(const flash::cpu::FwdPlan& plan, const Batch& batch) {
  for (int b = 0; b < static_cast<int>(batch.seqlens_q.size()); ++b)
    for (int head_k = 0; head_k < batch.h_k; ++head_k) split_of_scores(plan, batch, b, head_k);
}

// Each row has one task for each split, also where it sees no key: somebody must store its result.
void check_rows(const flash::cpu::FwdPlan& plan, const Batch& batch,
                const flash::cpu::FwdTile& tile) {
  std::map<std::vector<int>, std::vector<int>> splits;  // (batch, head_k, row)
  int64_t rows = 0;
  for (const FwdTask& t : plan.tasks) {
    ASSERT_EQ(t.row_begin % tile.rows, 0);
    ASSERT_LT(t.row_begin, t.row_end);
    ASSERT_LE(t.row_end - t.row_begin, tile.task_rows);
    ASSERT_EQ(t.streamed, batch.rows(t.batch) <= tile.stream.rows);
    ASSERT_LE(t.heads, t.streamed ? tile.stream.heads : 1);
    ASSERT_LE(t.heads > 1 ? t.heads * (t.row_end - t.row_begin) : 0, tile.stream.task_rows);
    for (int head = t.head_k; head < t.head_k + t.heads; ++head)
      for (int row = t.row_begin; row < t.row_end; ++row) {
        std::vector<int>& of_row = splits[{t.batch, head, row}];
        of_row.resize(t.num_splits, 0);
        ++of_row.at(t.split);
      }
  }
  for (const auto& [place, of_row] : splits)
    for (int count : of_row) ASSERT_EQ(count, 1) << testing::PrintToString(place);
  for (int n : batch.seqlens_q) rows += int64_t{n} * batch.h;
  ASSERT_EQ(static_cast<int64_t>(splits.size()), rows);
}

// The parts of a row block lie one after the other, head by head; together they fill the buffer
// without overlap.
void check_partial_rows(const flash::cpu::FwdPlan& plan) {
  std::vector<int> uses(plan.partial_rows, 0);
  std::map<std::vector<int>, int64_t> base;
  for (const FwdTask& t : plan.tasks)
    if (t.num_splits > 1 && t.split == 0) base[{t.batch, t.head_k, t.row_begin}] = t.partial_row;
  for (const FwdTask& t : plan.tasks) {
    if (t.num_splits == 1) continue;
    const int64_t rows = t.row_end - t.row_begin;
    const int64_t first = base.at({t.batch, t.head_k, t.row_begin}) + t.split * rows;
    ASSERT_EQ(t.partial_row, first);
    for (int head = 0; head < t.heads; ++head)
      for (int64_t i = 0; i < rows; ++i) ++uses.at(first + head * t.num_splits * rows + i);
  }
  ASSERT_EQ(std::count(uses.begin(), uses.end(), 1), plan.partial_rows);
}

TEST(PlanFwd, ComputesEveryVisibleScoreOnce) {
  std::mt19937 rng(1);
  for (int n = 0; n < 120; ++n) {
    const flash::cpu::FwdTile& tile = n % 2 ? kTile : kStreamTile;
    Batch batch = random_batch(rng, n % 4 ? 120 : 6);
    const int threads = kThreads[n / 2 % std::size(kThreads)];
    const flash::Flash_fwd_params p = batch.fwd_params();
    const flash::cpu::FwdPlan plan = plan_fwd(p, tile, threads);
    check_coverage(plan, batch);
    check_rows(plan, batch, tile);
    check_partial_rows(plan);
    if (testing::Test::HasFatalFailure()) FAIL() << "batch " << n;
    if (threads == 1) continue;
    EXPECT_TRUE(std::is_sorted(plan.tasks.begin(), plan.tasks.end(), [&](auto& a, auto& b) {
      return task_flops(p, a) > task_flops(p, b);
    }));
  }
}

TEST(PlanFwd, SplitsDoNotDependOnThreads) {
  std::mt19937 rng(2);
  for (int n = 0; n < 40; ++n) {
    const flash::cpu::FwdTile& tile = n % 2 ? kTile : kStreamTile;
    Batch batch = random_batch(rng, n / 2 % 2 ? 8 : 100);
    batch.seqlens_k[0] = 4000;
    const flash::Flash_fwd_params p = batch.fwd_params();
    const int last = static_cast<int>(batch.seqlens_q.size()) - 1;
    const flash::cpu::FwdPlan one = plan_fwd(p, tile, 1);
    for (int threads : kThreads) {
      const flash::cpu::FwdPlan plan = plan_fwd(p, tile, threads);
      for (int b : {0, last})
        EXPECT_TRUE(split_of_scores(plan, batch, b, 0) == split_of_scores(one, batch, b, 0))
            << "batch " << n << ", " << threads << " threads";
    }
  }
}

TEST(PlanFwd, StreamedHeadsShareATaskUntilThreadsWait) {
  Batch batch{{1, 1}, {5000, 5000}, 24, 6, -1, 0, 0, {}, {}};
  const flash::Flash_fwd_params p = batch.fwd_params();
  EXPECT_EQ(plan_fwd(p, kStreamTile, 1).tasks.front().heads, 3);
  EXPECT_EQ(plan_fwd(p, kStreamTile, 192).tasks.front().heads, 1);
}

// A window leaves the same parts to a long sequence as to a short one.
TEST(PlanFwd, StreamedPartsCoverTheWindowAlone) {
  Batch batch{{1}, {100000}, 4, 4, 999, 0, 0, {}, {}};
  const flash::cpu::FwdPlan plan = plan_fwd(batch.fwd_params(), kStreamTile, 1);
  for (const FwdTask& t : plan.tasks) {
    EXPECT_EQ(t.num_splits, 2);
    EXPECT_GE(t.key_begin, 99000);
    EXPECT_LT(t.key_begin, t.key_end);
  }
}

TEST(PlanFwd, NumberOfSplits) {
  const struct {
    int seqlen_q, seqlen_k, wish, expected;
  } cases[] = {
      {1, 3200, 0, 5},
      {1, 3201, 0, 6},
      {1, 640, 0, 1},
      {1, 0, 0, 1},
      {25, 4096, 0, 1},  // more rows than a tile
      {1, 300000, 0, FLASH_ATTN_MAX_SPLITS},
      {1, 4096, 1, 1},
      {25, 4096, 7, 7},
      {1, 64, 7, 1},
      {1, 65, 7, 2},
      {1, 0, 7, 1},
  };
  for (const auto& c : cases) {
    Batch batch{{c.seqlen_q, 100}, {c.seqlen_k, 9999}, 1, 1, -1, -1, c.wish, {}, {}};
    const flash::Flash_fwd_params p = batch.fwd_params();
    EXPECT_EQ(num_splits(p, sequence(p, 0), kTile), c.expected)
        << c.seqlen_q << " x " << c.seqlen_k << " wish " << c.wish;
  }
}

// ------------------------------------------------------------------------------------ backward
constexpr int kChunk = 64;

// Threads take the tasks in order. A task may finish once the chunks before it have, and the head
// before it in its slot; which of the tasks that may finish does so next is random.
bool finishes(const flash::cpu::BwdPlan& plan, size_t threads, std::mt19937& rng) {
  std::vector<int> chunks_done(plan.heads.size(), 0);
  const auto done = [&](int h) { return h < 0 || chunks_done[h] == plan.heads[h].chunks; };
  std::vector<size_t> running;
  size_t next = 0;
  while (true) {
    while (running.size() < threads && next < plan.tasks.size()) running.push_back(next++);
    if (running.empty()) return true;
    std::vector<size_t> ready;
    for (size_t i = 0; i < running.size(); ++i) {
      const flash::cpu::BwdTask& t = plan.tasks[running[i]];
      if (chunks_done[t.head] == t.chunk && done(t.head - plan.wave_heads)) ready.push_back(i);
    }
    if (ready.empty()) return false;
    const size_t i = ready[rng() % ready.size()];
    ++chunks_done[plan.tasks[running[i]].head];
    running.erase(running.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

void check_bwd_plan(const flash::cpu::BwdPlan& plan, const Batch& batch, bool batch_order = false) {
  std::vector<std::vector<int>> heads;
  size_t chunks = 0;
  int max_rows = 0;
  for (int b = 0; b < static_cast<int>(batch.seqlens_k.size()); ++b) {
    max_rows = std::max(max_rows, batch.rows(b));
    for (int head_k = 0; head_k < batch.h_k && batch.seqlens_k[b] > 0; ++head_k) {
      heads.push_back({b, head_k, (batch.seqlens_k[b] + kChunk - 1) / kChunk});
      chunks += heads.back()[2];
    }
  }
  std::vector<std::vector<int>> planned;
  for (const flash::cpu::BwdHead& head : plan.heads)
    planned.push_back({head.batch, head.head_k, head.chunks});
  if (batch_order) {
    ASSERT_EQ(planned, heads);
  } else {
    EXPECT_TRUE(std::is_sorted(plan.heads.begin(), plan.heads.end(), [&](auto& a, auto& b) {
      return int64_t{a.chunks} * batch.rows(a.batch) > int64_t{b.chunks} * batch.rows(b.batch);
    }));
    std::sort(planned.begin(), planned.end());
    ASSERT_EQ(planned, heads);
  }
  ASSERT_EQ(plan.tasks.size(), chunks);
  ASSERT_EQ(plan.max_rows, max_rows);
  std::vector<int> next_chunk(plan.heads.size(), 0);
  for (const flash::cpu::BwdTask& t : plan.tasks) {
    ASSERT_EQ(t.chunk, next_chunk.at(t.head)++) << "head " << t.head;
    for (int h = t.head - plan.wave_heads; h >= 0; h -= plan.wave_heads)
      ASSERT_EQ(next_chunk[h], plan.heads[h].chunks) << "head " << h << " before " << t.head;
  }
}

TEST(PlanBwd, EveryChunkOnceInAnOrderThatCannotDeadlock) {
  std::mt19937 rng(5);
  for (int n = 0; n < 300; ++n) {
    Batch batch = random_batch(rng, 120);
    const int planned = kThreads[n % std::size(kThreads)];
    const flash::cpu::BwdPlan plan = plan_bwd(batch.params(), kChunk, planned);
    EXPECT_GE(plan.wave_heads, 1);
    EXPECT_LE(plan.wave_heads, planned);
    check_bwd_plan(plan, batch);
    for (size_t threads = 1; threads <= 8; ++threads)
      ASSERT_TRUE(finishes(plan, threads, rng)) << "batch " << n << ", " << threads << " threads";
  }
}

TEST(PlanBwd, HeadsThatShareABiasGradientRunOneAfterTheOther) {
  Batch batch{{50, 60}, {100, 130}, 4, 2, -1, -1, 0, {}, {}};
  flash::Flash_bwd_params p = batch.params();
  float gradient;
  const struct {
    int64_t b, h;
    int wave_heads;
  } cases[] = {{2, 4, 4}, {1, 4, 1}, {2, 1, 1}, {1, 1, 1}};
  for (const auto& c : cases) {
    p.dbias.ptr = &gradient;
    p.dbias.b = c.b;
    p.dbias.h = c.h;
    EXPECT_EQ(plan_bwd(p, kChunk, 8).wave_heads, c.wave_heads) << c.b << ", " << c.h;
    check_bwd_plan(plan_bwd(p, kChunk, 8), batch, c.wave_heads == 1);
  }
}

}  // namespace
}  // namespace flash_test
