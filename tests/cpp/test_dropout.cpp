// Philox against known answers, and the place of every byte against the mapping that dropout.h
// documents.
#include "common/dropout.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

namespace flash_test {
namespace {

TEST(Philox, KnownAnswers) {  // of the Random123 library, philox4x32 with 7 rounds
  const struct {
    uint32_t counter[4];
    uint64_t key;
    uint32_t answer[4];
  } cases[] = {
      {{0, 0, 0, 0}, 0, {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       0xffffffffffffffff,
       {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       0x299f31d0a4093822,
       {0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}},
  };
  for (const auto& c : cases) {
    const flash::Philox4 r =
        flash::philox_4x32_7(c.key, {{c.counter[0], c.counter[1], c.counter[2], c.counter[3]}});
    for (int i = 0; i < 4; ++i) EXPECT_EQ(r.x[i], c.answer[i]) << i;
  }
}

// The byte of one score: a block of 16 x 32 scores, lane = 4 * (row % 8) + (column % 8) / 2, word t
// for columns 8 t .. 8 t + 7, bytes by row half, then column parity.
uint8_t documented_byte(uint64_t seed, uint64_t offset, uint32_t batch_head, uint32_t row,
                        uint32_t column) {
  const uint32_t row_in_block = row % 16, column_in_block = column % 32;
  const uint32_t lane = 4 * (row_in_block % 8) + column_in_block % 8 / 2;
  // Blocks of 16 rows have 8 row pairs; 4 lanes of a row share a block of columns.
  const uint32_t row_pair = row / 16 * 8 + lane / 4, column_lane = column / 32 * 4 + lane % 4;
  const uint64_t key = (seed & 0xffffffff) | ((seed >> 32 ^ offset >> 32) << 32);
  const flash::Philox4 r = flash::philox_4x32_7(
      key, {{column_lane, row_pair, batch_head, static_cast<uint32_t>(offset)}});
  const uint32_t byte = row_in_block / 8 * 2 + column_in_block % 2;
  return static_cast<uint8_t>(r.x[column_in_block / 8] >> 8 * byte);
}

TEST(Dropout, EveryByteLiesWhereTheMappingSaysIt) {
  const uint64_t seed = 0x123456789abcdef0, offset = 0x1122334455667788;
  const flash::Dropout dropout = flash::Dropout::make(0.5f, seed, offset);
  for (uint32_t batch_head : {0u, 5u, 4000000000u})
    for (uint32_t row = 0; row < 40; ++row)
      for (uint32_t block = 0; block < 3; ++block) {
        uint8_t bytes[32];
        dropout.row_bytes(batch_head, row, block, bytes);
        for (uint32_t i = 0; i < 32; ++i)
          ASSERT_EQ(bytes[i], documented_byte(seed, offset, batch_head, row, 32 * block + i))
              << "row " << row << " column " << 32 * block + i;
      }
}

TEST(Dropout, NoTwoPlacesShareRandomNumbers) {
  std::set<std::vector<uint8_t>> rows;
  size_t made = 0;
  for (uint64_t seed : {0ull, 1ull, 1ull << 32})
    for (uint64_t offset : {0ull, 1ull, 2ull << 32})
      for (uint32_t batch_head = 0; batch_head < 3; ++batch_head)
        for (uint32_t row = 0; row < 35; ++row)
          for (uint32_t block = 0; block < 3; ++block) {
            std::vector<uint8_t> bytes(32);
            flash::Dropout::make(0.1f, seed, offset)
                .row_bytes(batch_head, row, block, bytes.data());
            rows.insert(bytes);
            ++made;
          }
  EXPECT_EQ(rows.size(), made);
}

TEST(Dropout, ThresholdAndRescale) {
  const struct {
    float p;
    uint32_t threshold;
  } cases[] = {{0.f, 255}, {0.1f, 229}, {0.17f, 211}, {0.5f, 127}, {0.99f, 2}, {0.999f, 0}};
  for (const auto& c : cases) {
    const flash::Dropout dropout = flash::Dropout::make(c.p, 1, 2);
    EXPECT_EQ(dropout.enabled, c.p > 0.f);
    EXPECT_EQ(dropout.keep_threshold, c.threshold) << c.p;
    EXPECT_FLOAT_EQ(dropout.rescale, 1.f / (1.f - c.p));
  }
}

TEST(Dropout, KeepsTheFractionThatTheThresholdSays) {
  const flash::Dropout dropout = flash::Dropout::make(0.3f, 42, 0);
  int64_t kept = 0, total = 0;
  for (uint32_t row = 0; row < 256; ++row)
    for (uint32_t block = 0; block < 32; ++block, total += 32) {
      uint8_t bytes[32];
      dropout.row_bytes(7, row, block, bytes);
      for (uint8_t byte : bytes) kept += byte <= dropout.keep_threshold;
    }
  const double expected = (dropout.keep_threshold + 1) / 256.;
  const double deviation = std::sqrt(expected * (1 - expected) / static_cast<double>(total));
  EXPECT_NEAR(static_cast<double>(kept) / static_cast<double>(total), expected, 5 * deviation);
}

}  // namespace
}  // namespace flash_test
