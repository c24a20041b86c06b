// Where P's registers and V's keys meet in the forward of e4m3.
#if defined(FLASH_ATTN_HAVE_CUDA)
#include <gtest/gtest.h>

#include <set>

#include "base/ptx/fragments.h"
#include "hopper/column_of_key.h"

namespace flash_test {
namespace {

// Byte b of register i of a lane, which pack_in_8_bits makes of two n8 tiles of scores, is of the
// key that V transposed has in the column that A's byte b of this register multiplies.
TEST(HopperFp8, KeysOfPAreThoseOfVTransposed) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      for (int b = 0; b < 4; ++b) {
        const int half = i % 2, first_tile = i / 2 * 2;  // A's registers 2, 3 are of k = 16 on
        const auto score = flash::ptx::accumulator_element(lane, 2 * half + b % 2);
        const int key = 8 * (first_tile + b / 2) + score.col;
        const auto a = flash::ptx::a_element_8_bits(lane, i, b);
        EXPECT_EQ(a.row, score.row);
        EXPECT_EQ(a.col, key / 16 * 16 + flash::hopper::column_of_key(key % 16));
      }
    }
  }
}

TEST(HopperFp8, EachKeyHasAColumn) {
  std::set<int> columns;
  for (int key = 0; key < 16; ++key) columns.insert(flash::hopper::column_of_key(key));
  EXPECT_EQ(columns.size(), 16u);
  EXPECT_EQ(*columns.begin(), 0);
  EXPECT_EQ(*columns.rbegin(), 15);
}

}  // namespace
}  // namespace flash_test
#endif
