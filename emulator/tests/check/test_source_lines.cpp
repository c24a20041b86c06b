// Reports name the source line where the PTX has .loc and .file (nvcc -lineinfo).

#include <gtest/gtest.h>

#include <string>

#include "support/kernel_runner.h"

namespace gpu_emulator {
namespace {

// The kernel `k` of one argument, %rd0, with .loc before the instructions of its body.
std::string with_lines(const std::string& body) {
  return ".version 8.6\n.target sm_80\n.address_size 64\n.extern .shared .align 16 .b8 smem[];\n"
         ".visible .entry k(.param .u64 p0)\n{\n.reg .b32 %r<8>; .reg .b64 %rd<4>;\n"
         ".loc 1 10 0\nld.param.u64 %rd0, [p0];\nmov.u32 %r0, %tid.x;\nmov.u32 %r1, smem;\n"
         "shl.b32 %r2, %r0, 2;\nadd.u32 %r1, %r1, %r2;\ncvt.u64.u32 %rd1, %r2;\n"
         "add.u64 %rd1, %rd1, %rd0;\n" +
         body +
         "ret;\n}\n"
         ".file 1 \"/src/kernel.cu\"\n.file 2 \"/src/tile.cuh\"\n";
}

Report run(const std::string& body, uint32_t block) {
  KernelRunner runner(with_lines(body));
  std::vector<uint32_t> out(64, 0);
  runner.add(out);
  runner.launch.block = {block, 1, 1};
  runner.launch.dynamic_shared_bytes = 1024;
  return runner.run();
}

bool names(const Report& report, const std::string& place) {
  return report.text.find("(" + place + ")") != std::string::npos;
}

TEST(SourceLines, OfBothSidesOfARace) {
  const Report report =
      run(".loc 1 21 5\nst.shared.u32 [%r1], %r0;\n"
          ".loc 1 22 3\nxor.b32 %r3, %r1, 128;\n"
          ".loc 2 7 9, function_name $L__info0, inlined_at 1 23 3\nld.shared.u32 %r4, [%r3];\n"
          ".loc 1 24 3\nst.global.u32 [%rd1], %r4;\n",
          64);
  ASSERT_EQ(report.kind, "race") << report.text;
  EXPECT_TRUE(names(report, "/src/kernel.cu:21")) << report.text;
  EXPECT_TRUE(names(report, "/src/tile.cuh:7")) << report.text;
}

TEST(SourceLines, OfWhereAnUndefinedValueWasReadAndStored) {
  const Report report =
      run(".loc 1 31 3\nld.shared.u32 %r4, [%r1];\n.loc 1 32 3\nst.global.u32 [%rd1], %r4;\n", 32);
  ASSERT_EQ(report.kind, "undefined_store") << report.text;
  EXPECT_TRUE(names(report, "/src/kernel.cu:31")) << report.text;
  EXPECT_TRUE(names(report, "/src/kernel.cu:32")) << report.text;
}

TEST(SourceLines, OfAnAccessBehindAnAllocation) {
  const Report report = run(
      ".loc 1 40 3\nst.global.u32 [%rd1], %r0;\n.loc 2 41 3\nst.global.u32 [%rd1+256], %r0;\n", 64);
  ASSERT_EQ(report.kind, "wild_pointer") << report.text;
  EXPECT_EQ(report.cuda_error, 700);
  EXPECT_TRUE(names(report, "/src/tile.cuh:41")) << report.text;
  EXPECT_FALSE(names(report, "/src/kernel.cu:40")) << report.text;
}

// Line 0 stands before instructions that belong to no line; the one before them says most.
TEST(SourceLines, AreThoseBeforeALineOfZero) {
  const Report report =
      run(".loc 1 50 3\nmov.u32 %r4, 0;\n.loc 1 0 3\nst.global.u32 [%rd1+8], %r4;\n", 64);
  ASSERT_EQ(report.kind, "wild_pointer") << report.text;
  EXPECT_TRUE(names(report, "/src/kernel.cu:50")) << report.text;
}

}  // namespace
}  // namespace gpu_emulator
