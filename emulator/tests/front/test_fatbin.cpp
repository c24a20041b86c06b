#include "fatbin/fatbin.h"

#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "fatbin/lz4.h"
#include "support/elf_builder.h"
#include "support/fatbin_builder.h"

namespace gpu_emulator::fatbin {
namespace {

using testing_support::FatbinBuilder;

std::string ptx_for(const std::string& target) {
  return ".version 9.0\n.target " + target + "\n.address_size 64\n// " + std::string(100, 'x');
}

std::string error_of(Bytes fatbin, int major = 9, int minor = 0) {
  try {
    best_ptx(fatbin, major, minor);
  } catch (const FatbinError& error) {
    return error.what();
  }
  return "";
}

TEST(Lz4, DecodesLiteralsAndOverlappingMatches) {
  // 3 literals "abc", a match of 4 + 5 at distance 3, then 2 literals.
  const unsigned char block[] = {0x35, 'a', 'b', 'c', 3, 0, 0x20, 'x', 'y'};
  std::string text(14, '\0');
  const auto written =
      decode_lz4_block(std::as_bytes(std::span(block)), std::as_writable_bytes(std::span(text)));
  EXPECT_EQ(written, 14u);
  EXPECT_EQ(text, "abcabcabcabcxy");
}

TEST(Lz4, RefusesDamagedBlocks) {
  std::string text(14, '\0');
  const auto decode = [&](std::vector<unsigned char> block, size_t room) {
    return decode_lz4_block(std::as_bytes(std::span(block)),
                            std::as_writable_bytes(std::span(text)).first(room));
  };
  EXPECT_FALSE(decode({0x35, 'a', 'b', 'c', 4, 0, 0x20, 'x', 'y'}, 14)) << "before the beginning";
  EXPECT_FALSE(decode({0x35, 'a', 'b', 'c', 0, 0, 0x20, 'x', 'y'}, 14)) << "distance 0";
  EXPECT_FALSE(decode({0x35, 'a', 'b', 'c', 3, 0, 0x20, 'x', 'y'}, 11)) << "no room for a match";
  EXPECT_FALSE(decode({0x35, 'a', 'b', 'c', 3, 0, 0x20, 'x', 'y'}, 13)) << "no room for literals";
  EXPECT_FALSE(decode({0x35, 'a', 'b'}, 14)) << "literals cut off";
  EXPECT_FALSE(decode({0xf0, 255, 255}, 14)) << "length cut off";
  EXPECT_FALSE(decode({0x35, 'a', 'b', 'c', 3}, 14)) << "distance cut off";
}

TEST(Fatbin, ChoosesTheHighestTargetThatRuns) {
  FatbinBuilder builder;
  builder.add_ptx(80, ptx_for("sm_80"));
  builder.add_machine_code(80);
  builder.add_ptx(90, ptx_for("sm_90"));
  builder.add_ptx(90, ptx_for("sm_90a"));
  builder.add_ptx(75, ptx_for("sm_75"));
  builder.add_ptx(100, ptx_for("sm_100"));
  const auto chosen = [&](int major, int minor) {
    return target_of(best_ptx(builder.bytes(), major, minor));
  };
  EXPECT_EQ(chosen(9, 0), "sm_90a");
  EXPECT_EQ(chosen(8, 0), "sm_80");
  EXPECT_EQ(chosen(8, 9), "sm_80");
  EXPECT_EQ(chosen(7, 5), "sm_75");
  EXPECT_EQ(chosen(10, 0), "sm_100");
  EXPECT_EQ(chosen(9, 5), "sm_90");
}

TEST(Fatbin, TargetsRunWherePtxSays) {
  EXPECT_TRUE(runs_on("sm_80", 9, 0));
  EXPECT_FALSE(runs_on("sm_90", 8, 0));
  EXPECT_TRUE(runs_on("sm_90a", 9, 0));
  EXPECT_FALSE(runs_on("sm_90a", 10, 0));
  EXPECT_TRUE(runs_on("sm_100f", 10, 3));
  EXPECT_FALSE(runs_on("sm_100f", 12, 0));
  EXPECT_FALSE(runs_on("", 9, 0));
  EXPECT_FALSE(runs_on("sm_90xy", 9, 0));
}

TEST(Fatbin, SaysWhatIsThereInstead) {
  FatbinBuilder builder;
  builder.add_machine_code(80);
  builder.add_ptx(90, ptx_for("sm_90a"));
  const std::string error = error_of(builder.bytes(), 8, 0);
  EXPECT_NE(error.find("no PTX that runs on sm_80"), std::string::npos) << error;
  EXPECT_NE(error.find("machine code for sm_80, PTX for compute_90"), std::string::npos) << error;
}

TEST(Fatbin, ReadsLz4) {
  FatbinBuilder builder;
  const std::string ptx = ptx_for("sm_80");
  builder.add_lz4_ptx(80, ptx);
  EXPECT_EQ(best_ptx(builder.bytes(), 8, 0), ptx);
}

TEST(Fatbin, EveryTruncationIsAnError) {
  FatbinBuilder builder;
  builder.add_ptx(80, ptx_for("sm_80"));
  builder.add_lz4_ptx(90, ptx_for("sm_90"));
  const Bytes whole = builder.bytes();
  ASSERT_EQ(error_of(whole), "");
  for (size_t size = 0; size < whole.size(); ++size) {
    const std::vector<std::byte> part(whole.begin(), whole.begin() + static_cast<long>(size));
    EXPECT_NE(error_of(part), "") << size;
  }
}

TEST(Fatbin, AbsurdSizesAreErrors) {
  FatbinBuilder builder;
  builder.add_lz4_ptx(80, ptx_for("sm_80"));
  for (size_t field : {0, 4, 6, 8, 12, 16 + 4, 16 + 8, 16 + 16, 16 + 40, 16 + 56}) {
    auto bytes = std::vector<std::byte>(builder.bytes().begin(), builder.bytes().end());
    std::memset(bytes.data() + field, 0xff, field == 6 || field == 4 ? 2 : 4);
    if (field == 4 || field == 16 + 40) {
      error_of(bytes);  // a version and flags that nobody knows: any answer, but no crash
    } else {
      EXPECT_NE(error_of(bytes), "") << field;
    }
  }
}

TEST(Elf, FindsTheFatbins) {
  FatbinBuilder first, second;
  first.add_ptx(80, ptx_for("sm_80"));
  second.add_ptx(90, ptx_for("sm_90a"));
  std::vector<std::byte> section(first.bytes().begin(), first.bytes().end());
  section.resize(section.size() + 16);  // zeros between them
  section.insert(section.end(), second.bytes().begin(), second.bytes().end());
  const std::string file = testing_support::elf_with_fatbins(section);
  const std::vector<Bytes> found = embedded_fatbins(std::as_bytes(std::span(file)));
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(target_of(best_ptx(found[0], 8, 0)), "sm_80");
  EXPECT_EQ(target_of(best_ptx(found[1], 9, 0)), "sm_90a");
  for (size_t size = 0; size < file.size(); ++size) {
    EXPECT_THROW(embedded_fatbins(std::as_bytes(std::span(file).first(size))), FatbinError) << size;
  }
}

TEST(Elf, RefusesWhatIsNotElf) {
  EXPECT_THROW(embedded_fatbins({}), FatbinError);
  const std::string text(1000, 'x');
  EXPECT_THROW(embedded_fatbins(std::as_bytes(std::span(text))), FatbinError);
}

}  // namespace
}  // namespace gpu_emulator::fatbin
