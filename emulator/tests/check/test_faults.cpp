// Planted faults: each is found in every mode, with the right kind and the right lines, also where
// only this kind is reported, and not where it is switched off; its repaired twin runs without a
// report.

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>

#include "exec/report_kinds.h"
#include "kernel_file.h"

namespace gpu_emulator::testing {
namespace {

std::vector<std::string> fault_files() {
  std::vector<std::string> paths;
  const std::string folder = std::string(GPU_EMULATOR_TESTS) + "/check/faults";
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() == ".ptx") paths.push_back(entry.path());
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

bool names(const Report& report, int line) {
  return report.text.find("PTX line " + std::to_string(line) + ":") != std::string::npos;
}

// kinds: "race | deadlock"
bool is_one_of(const std::string& kind, const std::string& kinds) {
  return !kind.empty() && (" | " + kinds + " | ").find(" | " + kind + " | ") != std::string::npos;
}

std::vector<const exec::ReportInfo*> switchable_kinds() {
  std::vector<const exec::ReportInfo*> list;
  for (int i = 0; i < exec::kReportKinds; ++i) {
    const exec::ReportInfo& info = exec::info_of(static_cast<exec::ReportKind>(i));
    if (info.group != exec::ReportGroup::kAlways) list.push_back(&info);
  }
  return list;
}

// "-race-in_flight": the file's kinds that can be switched, each with the sign.
std::string with_sign(const KernelFile& file, const std::string& sign) {
  std::string text;
  for (const exec::ReportInfo* info : switchable_kinds()) {
    if (is_one_of(info->name, file.kind)) text += sign + info->name;
  }
  return text;
}

void expect_found(const KernelFile& file, const Options& options) {
  const Report report = run_kernel(file, file.faulty, options).report;
  ASSERT_TRUE(is_one_of(report.kind, file.kind)) << report.kind << ": " << report.text;
  ASSERT_NE(report.text.find("kernel kernel"), std::string::npos) << report.text;
  ASSERT_NE(report.text.find("kind: " + report.kind), std::string::npos) << report.text;
  for (int line : file.lines) {
    ASSERT_TRUE(names(report, line)) << "line " << line << " is missing in: " << report.text;
  }
  const bool one_of = std::any_of(file.either_lines.begin(), file.either_lines.end(),
                                  [&](int line) { return names(report, line); });
  ASSERT_TRUE(one_of || file.either_lines.empty()) << report.text;
}

class Fault : public ::testing::TestWithParam<std::string> {};

TEST_P(Fault, IsFoundWithItsLines) {
  const KernelFile file = read_kernel_file(GetParam());
  ASSERT_FALSE(file.lines.empty() && file.either_lines.empty());
  for (const Options& options : modes_of(file)) {
    SCOPED_TRACE(file.description + "\n" + name_of(options));
    expect_found(file, options);
  }
}

TEST_P(Fault, IsFoundByItsKindAlone) {
  const KernelFile file = read_kernel_file(GetParam());
  for (Options options : modes_of(file)) {
    options.checks = exec::Checks::parse("none" + with_sign(file, "+"));
    SCOPED_TRACE(file.description + "\n" + name_of(options));
    expect_found(file, options);
  }
}

TEST_P(Fault, IsNotReportedWhenSwitchedOff) {
  const KernelFile file = read_kernel_file(GetParam());
  const std::string off = with_sign(file, "-");
  for (Options options : modes_of(file)) {
    if (off.empty()) continue;
    options.checks = exec::Checks::parse("all" + off);
    SCOPED_TRACE(file.description + "\n" + name_of(options));
    const Report report = run_kernel(file, file.faulty, options).report;
    EXPECT_EQ((off + "-").find("-" + report.kind + "-"), std::string::npos) << report.text;
  }
}

TEST_P(Fault, RepairedTwinPasses) {
  const KernelFile file = read_kernel_file(GetParam());
  ASSERT_NE(file.faulty, file.repaired);
  std::vector<uint32_t> first;
  for (const Options& options : all_modes()) {
    SCOPED_TRACE(file.description + "\n" + name_of(options));
    const Outcome outcome = run_kernel(file, file.repaired, options);
    ASSERT_EQ(outcome.report.text, "");
    if (first.empty()) first = outcome.output;
    ASSERT_EQ(outcome.output, first);
  }
}

TEST(Faults, CoverEveryKindThatCanBeSwitched) {
  std::string kinds;
  for (const std::string& path : fault_files()) kinds += " | " + read_kernel_file(path).kind;
  for (const exec::ReportInfo* info : switchable_kinds()) {
    EXPECT_TRUE(is_one_of(info->name, kinds)) << info->name;
  }
}

INSTANTIATE_TEST_SUITE_P(Planted, Fault, ::testing::ValuesIn(fault_files()),
                         [](const auto& parameter) {
                           return read_kernel_file(parameter.param).name;
                         });

}  // namespace
}  // namespace gpu_emulator::testing
