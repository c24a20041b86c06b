// How decoding cuts keys into units, and how many CTAs share a tile.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "common/split_heuristic.h"

namespace flash_test {
namespace {

constexpr int kBlock = 64;

TEST(UnitKeys, AreThoseOfTheSequencesOwnLength) {
  EXPECT_EQ(flash::unit_keys(0, 0, kBlock), 128);
  EXPECT_EQ(flash::unit_keys(1, 0, kBlock), 128);
  EXPECT_EQ(flash::unit_keys(32 * 128, 0, kBlock), 128);
  EXPECT_EQ(flash::unit_keys(32 * 128 + 1, 0, kBlock), 256);
  EXPECT_EQ(flash::unit_keys(32 * 1024, 0, kBlock), 1024);
  EXPECT_EQ(flash::unit_keys(1 << 20, 0, kBlock), 1024);
}

TEST(UnitKeys, AreLongerWhereResultsOfUnitsAreLarge) {
  constexpr flash::UnitSizes kLong{.least = 512, .most = 4096, .few = 16};
  EXPECT_EQ(flash::unit_keys(1, 0, kBlock, kLong), 512);
  EXPECT_EQ(flash::unit_keys(16 * 512 + 1, 0, kBlock, kLong), 1024);
  EXPECT_EQ(flash::unit_keys(1 << 20, 0, kBlock, kLong), 4096);
  EXPECT_EQ(flash::unit_keys(1000, 3, kBlock, kLong), 384);
  int most = 0;
  for (int keys = 0; keys <= 200000; keys += 61) {
    most = std::max(most, flash::unit_count(keys, 0, kBlock, kLong));
    EXPECT_LE(most, flash::max_unit_count(keys, 0, kBlock, kLong)) << keys;
  }
}

TEST(UnitKeys, ObeyTheCallersNumberOfSplits) {
  EXPECT_EQ(flash::unit_keys(1000, 1, kBlock), 1024);
  EXPECT_EQ(flash::unit_keys(1000, 3, kBlock), 384);
  EXPECT_EQ(flash::unit_keys(1000, 100, kBlock), kBlock);
  for (int splits : {1, 2, 3, 7, 16, 1000}) {
    for (int keys : {0, 1, 64, 65, 1000, 4097})
      EXPECT_LE(flash::unit_count(keys, splits, kBlock), splits) << keys;
  }
}

TEST(UnitCount, OfNoShorterSequenceIsBeyondTheMost) {
  for (int splits : {0, 1, 5, 40}) {
    int most = 0;
    for (int keys = 0; keys <= 40000; keys += keys < 300 ? 1 : 61) {
      const int count = flash::unit_count(keys, splits, kBlock);
      most = count > most ? count : most;
      EXPECT_LE(most, flash::max_unit_count(keys, splits, kBlock)) << keys << ", " << splits;
    }
  }
  EXPECT_EQ(flash::max_unit_count(4096, 0, kBlock), 32);
  EXPECT_EQ(flash::max_unit_count(4097, 0, kBlock), 32);  // 4096 keys have more than 4097
  EXPECT_EQ(flash::max_unit_count(1 << 17, 0, kBlock), 128);
  EXPECT_EQ(flash::max_unit_count(1 << 17, 7, kBlock), 7);
}

// Two CTAs on each SM of an A100, an H100 and an L4-like card with 46 SMs, one on the last.
TEST(CtasPerTile, FillTheDevice) {
  constexpr int64_t kA100 = 2 * 108, kH100 = 2 * 132, kSmall = 46;
  // One sequence, 8 key-value heads, 32 units: two units a CTA, of which all run at a time.
  EXPECT_EQ(flash::ctas_per_tile(8, 32, kA100), 16);
  EXPECT_EQ(flash::ctas_per_tile(8, 32, kH100), 32);
  EXPECT_EQ(flash::ctas_per_tile(8, 32, kSmall), 5);
  // One head alone: a unit a CTA.
  EXPECT_EQ(flash::ctas_per_tile(1, 32, kA100), 32);
  EXPECT_EQ(flash::ctas_per_tile(1, 128, kH100), 128);
  EXPECT_EQ(flash::ctas_per_tile(1, 128, kSmall), 43);  // three units each
  // Enough tiles without sharing.
  EXPECT_EQ(flash::ctas_per_tile(kA100, 32, kA100), 1);
  EXPECT_EQ(flash::ctas_per_tile(64 * 8, 32, kH100), 1);
  // Half of the device would have nothing to do.
  EXPECT_EQ(flash::ctas_per_tile(108, 32, kA100), 2);
  // No keys, no units.
  EXPECT_EQ(flash::ctas_per_tile(8, 0, kA100), 1);
}

TEST(CtasPerTile, GiveEachUnitToOneCta) {
  for (int ctas = 1; ctas < 9; ++ctas) {
    for (int units = 0; units < 20; ++units) {
      std::vector<int> visits(units);
      int sharers = 0, most = 0;
      for (int cta = 0; cta < ctas; ++cta) {
        const flash::UnitShare share = flash::share_of(cta, ctas, units);
        sharers += share.begin < share.end;
        most = share.end - share.begin > most ? share.end - share.begin : most;
        for (int unit = share.begin; unit < share.end; ++unit) ++visits[unit];
        EXPECT_EQ(share.sharers, units < ctas ? (units > 0 ? units : 1) : ctas);
      }
      EXPECT_EQ(visits, std::vector<int>(units, 1));
      EXPECT_EQ(sharers, units < ctas ? units : ctas);
      EXPECT_LE(most, (units + ctas - 1) / ctas);
    }
  }
}

}  // namespace
}  // namespace flash_test
