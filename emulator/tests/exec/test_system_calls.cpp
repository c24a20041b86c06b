// printf and assert of device code, calls through pointers.

#include <algorithm>
#include <string>

#include "support/kernel_runner.h"

namespace gpu_emulator {
namespace {

// A .global string.
std::string text_variable(const std::string& name, const std::string& text) {
  std::string declaration =
      ".global .align 1 .b8 " + name + "[" + std::to_string(text.size() + 1) + "] = {";
  for (const char c : text) declaration += std::to_string(static_cast<int>(c)) + ", ";
  return declaration + "0};\n";
}

const char kHeader[] =
    ".version 8.6\n.target sm_80\n.address_size 64\n"
    ".extern .func (.param .b32 result) vprintf (.param .b64 format, .param .b64 arguments);\n"
    ".extern .func __assertfail (.param .b64 message, .param .b64 file, .param .b32 line, "
    ".param .b64 function, .param .b64 size);\n";

struct Outcome {
  Report report;
  std::string printed;
  std::vector<uint32_t> out;
};

// A kernel of 64 bytes of local memory at %rd1, generic %rd2; %r0 is the thread, %r1 the CTA, %r40
// what it stores for each thread of the grid.
Outcome run(const std::string& variables, const std::string& body, uint32_t block = 1,
            uint32_t grid = 1) {
  std::string text = kHeader + variables;
  text += R"(.visible .entry k(.param .u64 p0)
{
  .local .align 8 .b8 buffer[64];
  .reg .b32 %r<64>; .reg .b64 %rd<64>; .reg .pred %p<8>;
  mov.u64 %rd1, buffer;
  cvta.local.u64 %rd2, %rd1;
  ld.param.u64 %rd0, [p0];
  mov.u32 %r0, %tid.x;
  mov.u32 %r1, %ctaid.x;
  mov.u32 %r40, 0;
)" + body +
          R"(
  mov.u32 %r2, %ntid.x;
  mad.lo.u32 %r2, %r1, %r2, %r0;
  mul.wide.u32 %rd50, %r2, 4;
  add.u64 %rd50, %rd50, %rd0;
  st.global.u32 [%rd50], %r40;
  ret;
}
)";
  KernelRunner runner(text);
  Outcome result;
  result.out.assign(size_t{block} * grid, 0xdddddddd);
  std::vector<std::byte> image(runner.program().module_bytes);
  runner.add(result.out);
  runner.launch.module_base = reinterpret_cast<uint64_t>(image.data());
  const std::vector<std::byte> initial = runner.program().image(runner.launch.module_base);
  std::copy(initial.begin(), initial.end(), image.begin());
  runner.map_memory(runner.launch.module_base, image.size());
  runner.launch.block = {block, 1, 1};
  runner.launch.grid = {grid, 1, 1};
  ::testing::internal::CaptureStdout();
  result.report = runner.run();
  result.printed = ::testing::internal::GetCapturedStdout();
  return result;
}

// Prints with the arguments that lie in the local buffer; %r40 is what vprintf returns.
const char kPrint[] = R"(
  mov.u64 %rd10, format;
  cvta.global.u64 %rd10, %rd10;
  {
    .param .b64 a0; .param .b64 a1; .param .b32 r0;
    st.param.b64 [a0], %rd10;
    st.param.b64 [a1], %rd2;
    call.uni (r0), vprintf, (a0, a1);
    ld.param.b32 %r40, [r0];
  }
)";

Outcome print(const std::string& format, const std::string& stores) {
  return run(text_variable("format", format) + text_variable("word", "text"), stores + kPrint);
}

TEST(Printf, ConvertsIntegers) {
  const Outcome result = print("%d|%5d|%-5d|%05d|%+d|%u|%x|%X|%#o|%i\n", R"(
    st.local.s32 [%rd1], -7;       st.local.s32 [%rd1+4], 42;  st.local.s32 [%rd1+8], 42;
    st.local.s32 [%rd1+12], -42;   st.local.s32 [%rd1+16], 42; st.local.u32 [%rd1+20], 4294967295;
    st.local.u32 [%rd1+24], 48879; st.local.u32 [%rd1+28], 48879; st.local.u32 [%rd1+32], 8;
    st.local.s32 [%rd1+36], -1;
  )");
  EXPECT_EQ(result.report.text, "");
  EXPECT_EQ(result.printed, "-7|   42|42   |-0042|+42|4294967295|beef|BEEF|010|-1\n");
  EXPECT_EQ(result.out[0], result.printed.size());
}

TEST(Printf, AlignsArgumentsToTheirSize) {
  const Outcome result = print("%d %lld %u %llu %lx %zu %jd %c%c\n", R"(
    st.local.s32 [%rd1], 1;
    mov.s64 %rd20, -123456789012; st.local.s64 [%rd1+8], %rd20;
    st.local.u32 [%rd1+16], 2;
    mov.u64 %rd21, 18446744073709551615; st.local.u64 [%rd1+24], %rd21;
    mov.u64 %rd22, 81985529216486895; st.local.u64 [%rd1+32], %rd22;
    st.local.u64 [%rd1+40], %rd21;
    st.local.s64 [%rd1+48], %rd20;
    st.local.u32 [%rd1+56], 111; st.local.u32 [%rd1+60], 107;
  )");
  EXPECT_EQ(result.report.text, "");
  EXPECT_EQ(result.printed,
            "1 -123456789012 2 18446744073709551615 123456789abcdef 18446744073709551615 "
            "-123456789012 ok\n");
}

TEST(Printf, ConvertsFloatsTextsAndPointers) {
  const Outcome result = print("%f|%8.3f|%e|%s|%8s|%-6s|%.2s|%p|%%\n", R"(
    mov.u64 %rd20, 4609434218613702656;
    st.local.u64 [%rd1], %rd20; st.local.u64 [%rd1+8], %rd20; st.local.u64 [%rd1+16], %rd20;
    mov.u64 %rd21, word; cvta.global.u64 %rd21, %rd21;
    st.local.u64 [%rd1+24], %rd21; st.local.u64 [%rd1+32], %rd21; st.local.u64 [%rd1+40], %rd21;
    st.local.u64 [%rd1+48], %rd21;
    mov.u64 %rd22, 48879; st.local.u64 [%rd1+56], %rd22;
  )");
  EXPECT_EQ(result.report.text, "");
  EXPECT_EQ(result.printed, "1.500000|   1.500|1.500000e+00|text|    text|text  |te|0xbeef|%\n");
}

TEST(Printf, TakesWidthsFromArguments) {
  const Outcome result = print("%*d|%-*d|%.*f\n", R"(
    st.local.u32 [%rd1], 6;    st.local.u32 [%rd1+4], 42;
    st.local.u32 [%rd1+8], 4;  st.local.u32 [%rd1+12], 7;
    st.local.u32 [%rd1+16], 2; mov.u64 %rd20, 4609434218613702656; st.local.u64 [%rd1+24], %rd20;
  )");
  EXPECT_EQ(result.report.text, "");
  EXPECT_EQ(result.printed, "    42|7   |1.50\n");
}

TEST(Printf, BoundsWidths) {
  const Outcome result = print("%999999999d|%00000012d|%-*d|%5.0000002147483647s\n", R"(
    st.local.u32 [%rd1], 42; st.local.u32 [%rd1+4], 42;
    st.local.u32 [%rd1+8], 2147483647; st.local.u32 [%rd1+12], 42;
    mov.u64 %rd21, word; cvta.global.u64 %rd21, %rd21; st.local.u64 [%rd1+16], %rd21;
  )");
  EXPECT_EQ(result.report.text, "");
  EXPECT_EQ(result.printed,
            std::string(9997, ' ') + "42|000000000042|42" + std::string(9997, ' ') + "| text\n");
}

TEST(Printf, PrintsOnceForEachLaneThatCalls) {
  const std::string body =
      "st.local.u32 [%rd1], %r0;\nand.b32 %r3, %r0, 7;\n"
      "setp.ne.u32 %p0, %r3, 5;\n@%p0 bra SKIP;\n" +
      std::string(kPrint) + "SKIP:\n";
  const Outcome result = run(text_variable("format", "<%u>"), body, 32);
  EXPECT_EQ(result.report.text, "");
  EXPECT_EQ(result.printed, "<5><13><21><29>");
  EXPECT_EQ(result.out[13], 4u);
  EXPECT_EQ(result.out[12], 0u);
}

TEST(Assert, NamesExpressionPlaceAndThreadAndStopsTheLaunch) {
  const std::string variables = text_variable("message", "i < n") +
                                text_variable("file", "kernel.cu") +
                                text_variable("function", "void f(int)");
  const std::string body = R"(
    mov.u32 %r40, 1;
    setp.eq.u32 %p0, %r1, 1;
    setp.eq.and.u32 %p0, %r0, 37, %p0;
    @!%p0 bra GOOD;
    mov.u64 %rd10, message;  cvta.global.u64 %rd10, %rd10;
    mov.u64 %rd11, file;     cvta.global.u64 %rd11, %rd11;
    mov.u64 %rd12, function; cvta.global.u64 %rd12, %rd12;
    {
      .param .b64 a0; .param .b64 a1; .param .b32 a2; .param .b64 a3; .param .b64 a4;
      st.param.b64 [a0], %rd10; st.param.b64 [a1], %rd11; st.param.b32 [a2], 17;
      st.param.b64 [a3], %rd12; st.param.b64 [a4], 1;
      call.uni __assertfail, (a0, a1, a2, a3, a4);
    }
    GOOD:
  )";
  const Outcome result = run(variables, body, 64, 3);
  EXPECT_EQ(result.report.kind, "assertion");
  EXPECT_EQ(result.report.cuda_error, 710);  // CUDA_ERROR_ASSERT
  EXPECT_NE(result.report.text.find("kernel.cu:17: void f(int): assertion `i < n` failed."),
            std::string::npos)
      << result.report.text;
  EXPECT_NE(result.report.text.find("CTA (1,0,0), warp 1, lane 5"), std::string::npos)
      << result.report.text;
  EXPECT_EQ(result.out[0], 1u);
  EXPECT_EQ(result.out[64 + 37], 0xdddddddd);
  EXPECT_EQ(result.out[2 * 64], 0xdddddddd) << "CTAs after the failing one did not begin";
}

const char kCallees[] = R"(
.func (.param .b32 result) twice(.param .b32 x)
{ .reg .b32 %r; ld.param.b32 %r, [x]; shl.b32 %r, %r, 1; st.param.b32 [result], %r; ret; }
.func (.param .b32 result) square(.param .b32 x)
{
  .reg .b32 %r<2>; .reg .pred %p;
  ld.param.b32 %r0, [x];
  setp.gt.u32 %p, %r0, 20;                // the lanes come back one part after the other
  @%p bra LARGE;
  mul.lo.u32 %r1, %r0, %r0; st.param.b32 [result], %r1; ret;
  LARGE: mul.lo.u32 %r1, %r0, %r0; add.u32 %r1, %r1, 1; st.param.b32 [result], %r1; ret;
}
.func (.param .b32 result) minus(.param .b32 x)
{ .reg .b32 %r; ld.param.b32 %r, [x]; neg.s32 %r, %r; st.param.b32 [result], %r; ret; }
.global .align 8 .u64 table[3] = {twice, square, minus};
)";

// Calls table[index]; index in %r10.
std::string indirect_call(const std::string& declaration, const std::string& name) {
  return "mul.wide.u32 %rd10, %r10, 8;\nmov.u64 %rd11, table;\nadd.u64 %rd10, %rd10, %rd11;\n"
         "ld.global.u64 %rd12, [%rd10];\n{\n.param .b32 a0; .param .b32 r0;\n"
         "st.param.b32 [a0], %r0;\n" +
         name + ": " + declaration + ";\ncall (r0), %rd12, (a0), " + name +
         ";\nld.param.b32 %r40, [r0];\n}\n";
}

uint32_t called(uint32_t function, uint32_t x) {
  return function == 0 ? 2 * x : function == 1 ? x * x + (x > 20) : 0 - x;
}

TEST(IndirectCalls, ByPrototype) {
  for (uint32_t function = 0; function < 3; ++function) {
    const Outcome result =
        run(kCallees,
            "mov.u32 %r10, " + std::to_string(function) + ";\n" +
                indirect_call(".callprototype (.param .b32 _) _ (.param .b32 _)", "proto"),
            64);
    ASSERT_EQ(result.report.text, "");
    for (uint32_t i = 0; i < 64; ++i) ASSERT_EQ(result.out[i], called(function, i));
  }
}

TEST(IndirectCalls, ByTargets) {
  const Outcome result =
      run(kCallees,
          "mov.u32 %r10, 2;\n" + indirect_call(".calltargets twice, square, minus", "targets"), 32);
  ASSERT_EQ(result.report.text, "");
  for (uint32_t i = 0; i < 32; ++i) ASSERT_EQ(result.out[i], called(2, i));
}

TEST(IndirectCalls, LanesMayCallDifferentFunctions) {
  const Outcome result = run(
      kCallees,
      "rem.u32 %r10, %r0, 3;\nsetp.ne.u32 %p1, %r0, 11;\n@!%p1 bra SKIP;\n" +
          indirect_call(".callprototype (.param .b32 _) _ (.param .b32 _)", "proto") + "SKIP:\n",
      64);
  ASSERT_EQ(result.report.text, "");
  for (uint32_t i = 0; i < 64; ++i) {
    ASSERT_EQ(result.out[i], i == 11 ? 0 : called(i % 3, i)) << "thread " << i;
  }
}

TEST(IndirectCalls, OfNoFunctionIsReported) {
  const Outcome result =
      run("",
          "mov.u64 %rd12, 4096;\n{\n.param .b32 a0; .param .b32 r0;\nst.param.b32 [a0], %r0;\n"
          "p: .callprototype (.param .b32 _) _ (.param .b32 _);\ncall (r0), %rd12, (a0), p;\n}\n");
  EXPECT_EQ(result.report.kind, "invalid_operand");
  EXPECT_NE(result.report.text.find("0x1000, which is no function"), std::string::npos);
}

}  // namespace
}  // namespace gpu_emulator
