// Key ranges against the definition of visibility, key by key.
#include "common/mask.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <vector>

namespace flash_test {
namespace {

// flash_attn.h: i + sk - sq - left <= j <= i + sk - sq + right, -1: no limit.
bool sees(const flash::Mask& m, int i, int j) {
  const int64_t diagonal = int64_t{i} + m.seqlen_k - m.seqlen_q;
  return (m.left < 0 || j >= diagonal - m.left) && (m.right < 0 || j <= diagonal + m.right);
}

// Every small shape and window.
template <class F>
void for_small_masks(F f) {
  for (int sq = 1; sq <= 7; ++sq)
    for (int sk = 0; sk <= 7; ++sk)
      for (int left = -1; left <= 8; ++left)
        for (int right = -1; right <= 8; ++right) f(flash::Mask{sq, sk, left, right});
}

flash::Mask random_mask(std::mt19937& rng) {
  const auto below = [&](int n) { return static_cast<int>(rng() % n); };
  const auto window = [&] { return below(3) == 0 ? -1 : below(200); };
  return {1 + below(150), below(150), window(), window()};
}

void check_each_query(const flash::Mask& m) {
  for (int i = 0; i < m.seqlen_q; ++i) {
    const flash::KeyRange keys = m.keys(i);
    ASSERT_LE(0, keys.begin);
    ASSERT_LE(keys.begin, keys.end);
    ASSERT_LE(keys.end, m.seqlen_k);
    for (int j = 0; j < m.seqlen_k; ++j)
      ASSERT_EQ(keys.begin <= j && j < keys.end, sees(m, i, j))
          << "sq " << m.seqlen_q << " sk " << m.seqlen_k << " left " << m.left << " right "
          << m.right << " query " << i << " key " << j;
  }
}

// A range of queries sees what its queries see. It may count keys before the first visible one
// only where its first query sees none.
void check_ranges(const flash::Mask& m, int first, int last) {
  const flash::KeyRange keys = m.keys(first, last);
  int begin = m.seqlen_k, end = 0;
  for (int i = first; i <= last; ++i)
    for (int j = 0; j < m.seqlen_k; ++j)
      if (sees(m, i, j)) {
        begin = std::min(begin, j);
        end = std::max(end, j + 1);
      }
  const std::string where = testing::PrintToString(
      std::vector<int64_t>{m.seqlen_q, m.seqlen_k, m.left, m.right, first, last});
  if (end == 0) {
    ASSERT_LE(keys.end, keys.begin) << where;
    return;
  }
  ASSERT_EQ(keys.end, end) << where;
  const flash::KeyRange top = m.keys(first);
  const bool exact = top.begin < top.end;
  ASSERT_TRUE(exact ? keys.begin == begin : 0 <= keys.begin && keys.begin <= begin) << where;
}

TEST(Mask, KeysOfAQueryAreThoseItSees) {
  for_small_masks(check_each_query);
  std::mt19937 rng(1);
  for (int i = 0; i < 200; ++i) check_each_query(random_mask(rng));
}

TEST(Mask, KeysOfARangeAreTheUnion) {
  for_small_masks([](const flash::Mask& m) {
    for (int first = 0; first < m.seqlen_q; ++first)
      for (int last = first; last < m.seqlen_q; ++last) check_ranges(m, first, last);
  });
  std::mt19937 rng(2);
  for (int i = 0; i < 300; ++i) {
    const flash::Mask m = random_mask(rng);
    const int first = static_cast<int>(rng() % m.seqlen_q);
    check_ranges(m, first, first + static_cast<int>(rng() % (m.seqlen_q - first)));
  }
}

TEST(Mask, NeighbouringQueriesLeaveNoGap) {
  std::mt19937 rng(3);
  for (int n = 0; n < 500; ++n) {
    const flash::Mask m = random_mask(rng);
    for (int i = 1; i < m.seqlen_q; ++i) {
      const flash::KeyRange before = m.keys(i - 1), keys = m.keys(i);
      ASSERT_TRUE(before.begin == before.end || keys.begin <= before.end);
      ASSERT_LE(before.begin, keys.begin);
      ASSERT_LE(before.end, keys.end);
    }
  }
}

TEST(Mask, SurvivesTheLargestLengthsAndWindows) {
  constexpr int kMax = std::numeric_limits<int>::max();
  const flash::Mask wide{kMax, kMax, kMax, kMax};
  EXPECT_EQ(wide.keys(0).begin, 0);
  EXPECT_EQ(wide.keys(kMax - 1).end, kMax);
  const flash::Mask decode{1, kMax, -1, 0};
  EXPECT_EQ(decode.keys(0).end, kMax);
  const flash::Mask tall{kMax, 1, -1, 0};
  EXPECT_EQ(tall.keys(0, kMax - 2).end, 0);
  EXPECT_EQ(tall.keys(kMax - 1).end, 1);
}

}  // namespace
}  // namespace flash_test
