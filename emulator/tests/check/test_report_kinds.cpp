// The option `checks`, and that what people read lists all kinds of reports.

#include <gtest/gtest.h>

#include <fstream>
#include <sstream>
#include <stdexcept>

#include "exec/report_kinds.h"

namespace gpu_emulator::exec {
namespace {

std::string problem_of(const char* value) {
  try {
    Checks::parse(value);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

std::string text_of(const std::string& path) {
  std::ifstream stream(std::string(GPU_EMULATOR_TESTS) + "/../" + path);
  std::ostringstream text;
  text << stream.rdbuf();
  return text.str();
}

TEST(Checks, BeginWithASet) {
  EXPECT_EQ(Checks::parse("all"), Checks::all());
  EXPECT_EQ(Checks::parse("memory"), Checks::memory());
  EXPECT_EQ(Checks::parse("none"), Checks::none());
  for (int i = 0; i < kReportKinds; ++i) {
    const auto kind = static_cast<ReportKind>(i);
    const ReportGroup group = info_of(kind).group;
    EXPECT_TRUE(Checks::all()[kind]);
    EXPECT_EQ(Checks::memory()[kind], group != ReportGroup::kFollowed) << info_of(kind).name;
    EXPECT_EQ(Checks::none()[kind], group == ReportGroup::kAlways) << info_of(kind).name;
  }
}

TEST(Checks, AddAndLeaveOutKinds) {
  const Checks without = Checks::parse("all-proxy_fence-init_fence");
  EXPECT_FALSE(without[ReportKind::kProxyFence]);
  EXPECT_FALSE(without[ReportKind::kInitFence]);
  EXPECT_TRUE(without[ReportKind::kRace]);
  EXPECT_EQ(Checks::parse("all,-proxy_fence,-init_fence"), without);
  EXPECT_EQ(Checks::parse("-init_fence-proxy_fence"), without);
  EXPECT_EQ(Checks::parse("all-proxy_fence-init_fence-race+race"), without);
  EXPECT_EQ(Checks::parse("all-race+race"), Checks::all());
  const Checks only = Checks::parse("none+race");
  EXPECT_TRUE(only[ReportKind::kRace]);
  EXPECT_FALSE(only[ReportKind::kInFlight]);
  EXPECT_FALSE(only[ReportKind::kBulkWait]);
}

TEST(Checks, AskForNoMoreThanTheyNeed) {
  EXPECT_FALSE(Checks::memory().need_checker());
  EXPECT_TRUE(Checks::parse("none+init_fence").need_checker());
  EXPECT_FALSE(Checks::parse("none+init_fence").order_accesses());
  EXPECT_FALSE(Checks::parse("memory+race").follow_values());
  EXPECT_TRUE(Checks::parse("memory+in_flight").order_accesses());
  EXPECT_TRUE(Checks::parse("memory+undefined_atomic").follow_values());
  EXPECT_FALSE(Checks::parse("memory+undefined_atomic").order_accesses());
}

TEST(Checks, RejectWhatTheyDoNotKnow) {
  EXPECT_EQ(problem_of("all"), "");
  for (const char* value : {"", "everything", "all-", "all-proxy_fences", "all+", "all,", "all,,",
                            "all-race,", "allrace", "-", "all -race", "all-out_of_bounds", "ALL"}) {
    const std::string problem = problem_of(value);
    EXPECT_NE(problem, "") << value;
    for (int i = 0; i < kReportKinds; ++i) {
      const ReportInfo& info = info_of(static_cast<ReportKind>(i));
      if (info.group == ReportGroup::kAlways) continue;
      EXPECT_NE(problem.find(info.name), std::string::npos) << problem;
    }
  }
  EXPECT_NE(problem_of("all-proxy_fences").find("'proxy_fences'"), std::string::npos);
  EXPECT_NE(problem_of("all-out_of_bounds").find("always"), std::string::npos);
}

TEST(ReportKinds, AreListedForThoseWhoRead) {
  const std::string header = text_of("include/gpu_emulator/gpu_emulator.h");
  const std::string readme = text_of("README.md");
  for (int i = 0; i < kReportKinds; ++i) {
    const ReportInfo& info = info_of(static_cast<ReportKind>(i));
    if (info.kind == ReportKind::kInternal) continue;
    EXPECT_NE(header.find(info.name), std::string::npos) << info.name;
    const std::string row = "| `" + std::string(info.name) + "` | " + info.sentence + " |";
    EXPECT_NE(readme.find(row), std::string::npos) << row;
  }
}

}  // namespace
}  // namespace gpu_emulator::exec
