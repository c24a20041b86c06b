// The backward's order of visits and turns against brute force, and what it costs.
#include "common/bwd_schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "bwd_simulation.h"

namespace flash_test {
namespace {

using flash::BwdSchedule;
using flash::Mask;

// flash_attn.h: i + sk - sq - left <= j <= i + sk - sq + right, -1: no limit.
bool sees(const Mask& m, int i, int j) {
  const int64_t diagonal = int64_t{i} + m.seqlen_k - m.seqlen_q;
  return (m.left < 0 || j >= diagonal - m.left) && (m.right < 0 || j <= diagonal + m.right);
}

// Whether a query of block `queries` sees a key of block `keys`.
bool is_visible(const BwdSchedule& s, int queries, int keys) {
  for (int i = queries * s.m; i < std::min((queries + 1) * s.m, s.mask.seqlen_q); ++i)
    for (int j = keys * s.n; j < std::min((keys + 1) * s.n, s.mask.seqlen_k); ++j)
      if (sees(s.mask, i, j)) return true;
  return false;
}

template <class F>
void for_small_masks(F f) {
  for (const int sq : {1, 2, 5, 9, 12})
    for (const int sk : {1, 3, 8, 13})
      for (const int left : {-1, 0, 2, 6})
        for (const int right : {-1, 0, 1, 5}) f(Mask{sq, sk, left, right});
}

template <class F>
void for_small_schedules(F f) {
  for_small_masks([&](const Mask& mask) {
    for (const auto& [m, n] : std::vector<std::pair<int, int>>{{1, 1}, {2, 4}, {3, 2}, {4, 4}})
      f(BwdSchedule{mask, m, n});
  });
}

std::string text_of(const BwdSchedule& s) {
  return testing::PrintToString(
      std::vector<int64_t>{s.mask.seqlen_q, s.mask.seqlen_k, s.mask.left, s.mask.right, s.m, s.n});
}

int blocks_of(int length, int size) { return (length + size - 1) / size; }

TEST(BwdMask, QueriesThatSeeKeys) {
  for_small_masks([](const Mask& mask) {
    for (int first = 0; first < mask.seqlen_k; ++first)
      for (int last = first; last < mask.seqlen_k + 2; ++last) {
        const flash::QueryRange range = mask.queries(first, last);
        for (int i = 0; i < mask.seqlen_q; ++i) {
          bool is_seen = false;
          for (int j = first; j <= std::min(last, mask.seqlen_k - 1); ++j)
            is_seen |= sees(mask, i, j);
          ASSERT_EQ(range.begin <= i && i < range.end, is_seen)
              << text_of({mask, 1, 1}) << " keys " << first << ".." << last << " query " << i;
        }
      }
  });
}

TEST(BwdSchedule, EachVisiblePairOfBlocksIsVisitedOnce) {
  for_small_schedules([](const BwdSchedule& s) {
    for (int keys = 0; keys < blocks_of(s.mask.seqlen_k, s.n); ++keys) {
      const flash::QueryBlocks visits = s.visits(keys);
      std::set<int> visited;
      for (int step = 0; step < visits.count(); ++step) {
        ASSERT_TRUE(visited.insert(visits.at(step)).second) << text_of(s);
      }
      for (int queries = 0; queries < blocks_of(s.mask.seqlen_q, s.m); ++queries)
        ASSERT_EQ(visited.count(queries) > 0, is_visible(s, queries, keys))
            << text_of(s) << " queries " << queries << " keys " << keys;
    }
  });
}

TEST(BwdSchedule, TurnsAreAPermutation) {
  for_small_schedules([](const BwdSchedule& s) {
    for (int queries = 0; queries < blocks_of(s.mask.seqlen_q, s.m); ++queries) {
      std::vector<int> turns;
      for (int keys = 0; keys < blocks_of(s.mask.seqlen_k, s.n); ++keys) {
        const flash::QueryBlocks visits = s.visits(keys);
        if (!visits.contains(queries)) continue;
        const flash::Turn turn = s.turn(keys, queries);
        turns.push_back(turn.before);
        ASSERT_EQ(turn.is_last(), turn.before == turn.visitors - 1);
        ASSERT_EQ(turn.visitors, s.key_blocks(queries).end - s.key_blocks(queries).begin);
      }
      std::sort(turns.begin(), turns.end());
      for (size_t i = 0; i < turns.size(); ++i)
        ASSERT_EQ(turns[i], static_cast<int>(i)) << text_of(s) << " queries " << queries;
    }
  });
}

TEST(BwdSchedule, AllCtasEnd) {
  for_small_schedules([](const BwdSchedule& s) {
    for (const int slots : {1, 2, 6}) {
      const BwdWork work{s, 3, 2};
      ASSERT_TRUE(BwdSimulator(work, slots, 0.1, true).run().has_ended)
          << text_of(s) << " slots " << slots;
    }
  });
}

// On GPUs of 108 and 132 SMs, for tiles of 64 queries and 128 keys, a tenth of a visit in turn.
// Where all CTAs run at once and see the same queries, they queue up at the first block, a tenth of
// a visit each. (Starting at different blocks would spare that, but deadlocks where another kernel
// keeps some of them from starting.)
TEST(BwdSchedule, TheOrderCostsLittle) {
  const bool prints = std::getenv("FLASH_ATTN_PRINT_TABLES") != nullptr;
  if (prints) std::printf("| mask | SMs | seqlen | heads x batch | cost of the order |\n");
  for (const int right : {-1, 0})
    for (const int slots : {108, 132})
      for (const int seqlen : {2048, 4096, 8192})
        for (const int heads : {1, 2, 4, 8, 16, 32, 64}) {
          const Mask mask{seqlen, seqlen, -1, right};
          const double cost = cost_of_order({{mask, 64, 128}, heads, 1}, slots, 0.1) - 1.;
          if (prints)
            std::printf("| %s | %d | %d | %d | %.1f %% |\n", right < 0 ? "full" : "causal", slots,
                        seqlen, heads, 100. * cost);
          const bool run_at_once = heads * seqlen / 128 <= slots;
          EXPECT_LE(cost, run_at_once ? 0.05 : 0.03)
              << right << " " << slots << " " << seqlen << " " << heads;
        }
}

// Windows, and query heads that share keys.
TEST(BwdSchedule, TheOrderCostsLittleUnderWindowsAndForSharedKeys) {
  for (const Mask& mask : {Mask{4096, 4096, 1000, 0}, Mask{4096, 4096, 500, 500}})
    for (const int heads : {1, 8, 32})
      EXPECT_LE(cost_of_order({{mask, 64, 128}, heads, 1}, 132, 0.1), 1.03) << heads;
  for (const int right : {-1, 0})
    for (const int heads_k : {1, 4, 8, 32}) {
      const Mask mask{4096, 4096, -1, right};
      EXPECT_LE(cost_of_order({{mask, 64, 128}, heads_k, 4}, 132, 0.1), 1.03) << heads_k;
    }
}

}  // namespace
}  // namespace flash_test
