#include "ptx/parser.h"

#include <gtest/gtest.h>

#include <string>

namespace gpu_emulator::ptx {
namespace {

using Kind = Operand::Kind;

std::string header() { return ".version 9.0\n.target sm_90a\n.address_size 64\n"; }

// A kernel with this body; the body's first line is line 6.
std::string kernel(const std::string& body) {
  return header() + ".visible .entry k(.param .u64 p, .param .b32 n)\n{\n" + body + "\n}\n";
}

Function parse_kernel(const std::string& body) { return parse(kernel(body)).functions.at(0); }

std::string error_of(const std::string& text) {
  try {
    parse(text);
  } catch (const ParseError& error) {
    return error.what();
  }
  return "";
}

TEST(Parser, ReadsHeader) {
  const Module module = parse(".version 8.7\n.target sm_80, debug\n.address_size 64\n");
  EXPECT_EQ(module.version_major, 8);
  EXPECT_EQ(module.version_minor, 7);
  EXPECT_EQ(module.target, "sm_80");
}

TEST(Parser, ReadsInstruction) {
  const Function f = parse_kernel(
      ".reg .pred %p<2>; .reg .b32 %r<9>; .reg .b64 %rd<3>;\n"
      "@!%p1 ld.global.L2::128B.v2.b32 {%r1, _}, [%rd2+-16];");
  ASSERT_EQ(f.body.size(), 1u);
  const Instruction& ld = f.body[0];
  EXPECT_EQ(ld.opcode, "ld");
  EXPECT_EQ(ld.modifiers, (std::vector<std::string>{"global", "L2::128B", "v2", "b32"}));
  EXPECT_EQ(f.registers.at(ld.guard).name, "%p1");
  EXPECT_EQ(f.registers.at(ld.guard).type, Type::kPred);
  EXPECT_TRUE(ld.guard_negated);
  EXPECT_EQ(ld.line, 7);
  ASSERT_EQ(ld.operands.size(), 2u);
  ASSERT_EQ(ld.operands[0].kind, Kind::kVector);
  EXPECT_EQ(f.registers.at(ld.operands[0].elements[0].index).name, "%r1");
  EXPECT_EQ(ld.operands[0].elements[1].kind, Kind::kSink);
  ASSERT_EQ(ld.operands[1].kind, Kind::kMemory);
  EXPECT_EQ(ld.operands[1].value, -16);
  EXPECT_EQ(ld.operands[1].elements[0].kind, Kind::kRegister);
}

TEST(Parser, NamesOnlyRegistersInUse) {
  const Function f =
      parse_kernel(".reg .b32 %r<2000000000>; mov.b32 %r1999999999, %r0; mov.b32 %r0, %r0;");
  ASSERT_EQ(f.registers.size(), 2u);
  EXPECT_EQ(f.registers[0].name, "%r1999999999");
  EXPECT_EQ(f.registers[1].name, "%r0");
  EXPECT_NE(error_of(kernel(".reg .b32 %r<4>; mov.b32 %r4, 0;")), "");
  EXPECT_NE(error_of(kernel(".reg .b32 %r<4>; mov.b32 %r01, 0;")), "");
}

TEST(Parser, ReadsImmediates) {
  const Function f = parse_kernel(
      ".reg .b32 %r<2>; x.f32 %r1, 0f3F800000, -0f3F800000, 0d4004000000000000, 1.5, -7, 0x80, "
      "017, 0b101, 3U, 1+2*3, ~0, WARP_SZ;");
  const auto& o = f.body[0].operands;
  EXPECT_TRUE(o[1].is_float && o[1].is_f32);
  EXPECT_EQ(o[1].value, 0x3f800000);
  EXPECT_EQ(o[2].value, 0xbf800000);
  EXPECT_TRUE(o[3].is_float && !o[3].is_f32);
  EXPECT_EQ(o[3].value, 0x4004000000000000);
  EXPECT_EQ(o[4].value, 0x3ff8000000000000);
  const int64_t integers[] = {-7, 0x80, 15, 5, 3, 7, -1, 32};
  for (size_t i = 0; i < std::size(integers); ++i) {
    EXPECT_EQ(o[5 + i].value, integers[i]) << i;
    EXPECT_FALSE(o[5 + i].is_float);
  }
}

TEST(Parser, NestedScopesHideNames) {
  const Function f = parse_kernel(
      ".reg .b32 %r<4>; .reg .pred p;\n"
      "L: mov.b32 %r1, 1;\n"
      "{ .reg .b32 %r<4>; .reg .pred p; L: mov.b32 %r1, 2; @p bra L; @p bra M; }\n"
      "{ .reg .b32 %r1; L: mov.b32 %r1, 3; @p bra L; }\n"
      "mov.b32 %r1, 4; @p bra L;\n"
      "M: ret;");
  const auto target = [&](size_t i) {
    return f.labels.at(f.body[i].operands[0].index).instruction;
  };
  EXPECT_EQ(target(2), 1);
  EXPECT_EQ(target(3), 8) << "a label of the outer scope, defined later";
  EXPECT_EQ(target(5), 4);
  EXPECT_EQ(target(7), 0);
  EXPECT_EQ(f.body[0].operands[0].index, f.body[6].operands[0].index);
  EXPECT_NE(f.body[0].operands[0].index, f.body[1].operands[0].index);
  EXPECT_NE(f.body[1].operands[0].index, f.body[4].operands[0].index);
  EXPECT_NE(f.body[2].guard, f.body[5].guard);
}

TEST(Parser, LabelsOfInnerScopesAreHiddenOutside) {
  EXPECT_EQ(error_of(kernel("{ L: ret; }\nbra L;")), "line 7: unknown name 'L'");
}

TEST(Parser, ReadsVectorRegisters) {
  const Function f = parse_kernel(
      ".reg .v4 .f32 v; .reg .b32 %r; mov.b32 %r, v.z; ld.global.v4.f32 v, [p]; mov.b32 v.a, %r;");
  EXPECT_EQ(f.registers.at(f.body[0].operands[1].index).name, "v.z");
  ASSERT_EQ(f.body[1].operands[0].elements.size(), 4u);
  EXPECT_EQ(f.registers.at(f.body[1].operands[0].elements[3].index).name, "v.w");
  EXPECT_EQ(f.registers.at(f.body[2].operands[0].index).name, "v.w");
  EXPECT_NE(error_of(kernel(".reg .v2 .f32 v; mov.b32 v.z, 0;")), "");
}

TEST(Parser, ReadsPairsSinksAndTensorCoordinates) {
  const Function f = parse_kernel(
      ".reg .pred p, q; .reg .b32 %r<4>; .reg .b64 %rd<4>;\n"
      "setp.lt.and.s32 p|q, %r1, %r2, !q;\n"
      "elect.sync _|p, -1;\n"
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%r1], [%rd1, {%r2, 7}], [%r3], %rd2;");
  EXPECT_EQ(f.body[0].operands[0].kind, Kind::kPair);
  EXPECT_TRUE(f.body[0].operands[3].negated);
  EXPECT_EQ(f.body[1].operands[0].elements[0].kind, Kind::kSink);
  const Operand& map = f.body[2].operands[1];
  ASSERT_EQ(map.kind, Kind::kMemory);
  ASSERT_EQ(map.elements.size(), 2u);
  EXPECT_EQ(map.elements[1].kind, Kind::kVector);
  EXPECT_EQ(map.elements[1].elements[1].value, 7);
}

TEST(Parser, ReadsAddressesOfVariables) {
  const Module m = parse(
      header() +
      ".global .b32 g; .extern .shared .align 1024 .b8 smem[];\n"
      ".entry k(.param .align 64 .b8 map[128]) {\n"
      ".reg .b64 %rd<3>; .shared .align 8 .b64 bar; .local .b32 l[3];\n"
      "mov.u64 %rd1, g+8; mov.u64 %rd1, smem; ld.param.b64 %rd1, [map+16]; st.b64 [bar], %rd1;\n"
      "mov.u64 %rd2, l; ld.global.b64 %rd1, [64];\n}\n");
  const Function& f = m.functions.at(0);
  EXPECT_EQ(f.body[0].operands[1].kind, Kind::kVariable);
  EXPECT_EQ(f.body[0].operands[1].value, 8);
  EXPECT_EQ(m.variables.at(f.body[1].operands[1].index).alignment, 1024u);
  EXPECT_EQ(m.variables.at(f.body[1].operands[1].index).bytes, 0u);
  const Operand& param = f.body[2].operands[1];
  EXPECT_EQ(param.elements[0].variable_scope, Operand::Scope::kParam);
  EXPECT_EQ(param.value, 16);
  EXPECT_EQ(f.params[0].bytes, 128u);
  EXPECT_EQ(f.params[0].alignment, 64u);
  EXPECT_EQ(f.body[3].operands[0].elements[0].variable_scope, Operand::Scope::kFunction);
  EXPECT_EQ(f.variables.at(f.body[4].operands[1].index).bytes, 12u);
  EXPECT_EQ(f.body[5].operands[1].elements[0].value, 64);
}

TEST(Parser, ReadsCalls) {
  const Module m =
      parse(header() +
            ".extern .func (.param .b32 r) vprintf (.param .b64 a, .param .b64 b);\n"
            ".func (.param .b32 out) twice(.param .b32 in);\n"
            ".func (.param .b32 out) twice(.param .b32 in) { .reg .b32 %r; ld.param.b32 %r, [in];\n"
            "st.param.b32 [out], %r; ret; }\n"
            ".func (.reg .b32 ro) reg(.reg .b32 ri) { mov.b32 ro, ri; ret; }\n"
            ".entry k() { .reg .b64 %rd; .reg .b32 %r;\n"
            "{ .param .b32 param0; st.param.b32 [param0+0], 1; .param .b32 ret0;\n"
            "call.uni (ret0), twice, (param0); }\n"
            "{ .param .b32 param0; .param .b32 ret0;\n"
            "proto: .callprototype (.param .b32 _) _ (.param .b32 _);\n"
            "call (ret0), %rd, (param0), proto; }\n"
            "call (%r), reg, (%r); ret; }\n");
  ASSERT_EQ(m.functions.size(), 4u);
  EXPECT_FALSE(m.functions[0].has_body);
  EXPECT_TRUE(m.functions[1].has_body);
  EXPECT_EQ(m.functions[1].body[1].operands[0].elements[0].variable_scope, Operand::Scope::kReturn);
  EXPECT_EQ(m.functions[2].params[0].space, Space::kReg);
  EXPECT_EQ(m.functions[2].registers.at(m.functions[2].body[0].operands[1].index).name, "ri");
  const auto& body = m.functions[3].body;
  EXPECT_EQ(body[1].operands[1].kind, Kind::kFunction);
  EXPECT_EQ(body[1].operands[1].index, 1);
  EXPECT_EQ(body[2].operands[3].kind, Kind::kName);
  EXPECT_EQ(body[2].operands[3].name, "proto");
  EXPECT_NE(body[1].operands[0].elements[0].index, body[2].operands[0].elements[0].index)
      << "each call sequence has variables of its own";
}

TEST(Parser, ReadsBranchTables) {
  const Function f =
      parse_kernel(".reg .b32 %r;\nts: .branchtargets A, B, A;\nbrx.idx %r, ts;\nA: ret;\nB: ret;");
  EXPECT_EQ(f.body[0].operands[1].kind, Kind::kBranchTargets);
  ASSERT_EQ(f.branch_targets.at(0).size(), 3u);
  EXPECT_EQ(f.labels.at(f.branch_targets[0][1]).instruction, 2);
}

TEST(Parser, ReadsInitialisers) {
  const Module m = parse(
      header() +
      ".func f();\n"
      ".global .align 4 .b8 bytes[8] = {1, 0, 255};\n"
      ".global .u64 pointers[3] = {generic(bytes)+8, f, 5};\n"
      ".const .f32 floats[3] = {0f3F800000, 2.0, 3};\n"
      ".global .u16 rows[2][3] = {{1, 2}, {4, 5, 6}};\n"
      ".global .b32 open[] = {1, 2, 3};\n"
      ".global .v2 .u32 pair = {7, 8};\n"
      ".global .b8 packed[9] = {1, 0xFF(bytes), 0xFF00(bytes), 0xFF0000(bytes), "
      "0xFF000000(bytes), 0xFF00000000(bytes), 0xFF0000000000(bytes), 0xFF000000000000(bytes), "
      "0xFF00000000000000(bytes)};\n");
  EXPECT_EQ(m.variables[0].initial, (std::vector<uint8_t>{1, 0, 255}));
  EXPECT_EQ(m.variables[0].bytes, 8u);
  const Variable& pointers = m.variables[1];
  ASSERT_EQ(pointers.relocations.size(), 2u);
  EXPECT_EQ(pointers.initial[0], 8);
  EXPECT_EQ(pointers.initial[16], 5);
  EXPECT_TRUE(pointers.relocations[1].is_function);
  EXPECT_EQ(pointers.relocations[1].offset, 8u);
  EXPECT_EQ(m.variables[2].initial,
            (std::vector<uint8_t>{0, 0, 128, 63, 0, 0, 0, 64, 0, 0, 64, 64}));
  EXPECT_EQ(m.variables[3].initial, (std::vector<uint8_t>{1, 0, 2, 0, 0, 0, 4, 0, 5, 0, 6, 0}));
  EXPECT_EQ(m.variables[4].bytes, 12u);
  EXPECT_EQ(m.variables[5].initial[4], 8);
  EXPECT_EQ(m.variables[5].alignment, 8u);
  ASSERT_EQ(m.variables[6].relocations.size(), 1u);
  EXPECT_EQ(m.variables[6].relocations[0].offset, 1u);
}

TEST(Parser, ReadsPerformanceDirectives) {
  const Module m = parse(header() +
                         ".entry k() .maxntid 128, 2, 1 .minnctapersm 2 .maxnreg 168\n"
                         ".explicitcluster .reqnctapercluster 2 .pragma \"nounroll\"; { ret; }");
  const Function& f = m.functions.at(0);
  EXPECT_EQ(f.max_threads[0], 128);
  EXPECT_EQ(f.max_threads[1], 2);
  EXPECT_EQ(f.min_ctas_per_sm, 2);
  EXPECT_EQ(f.max_registers, 168);
  EXPECT_EQ(f.cluster[0], 2);
  EXPECT_EQ(f.cluster[2], 1);
  EXPECT_TRUE(f.explicit_cluster);
}

TEST(Parser, KeepsSourceLines) {
  const Module m = parse(kernel(".loc 2 17 5\nret;\n.loc 7 19 1, function_name $info, inlined_at 2 "
                                "3 4\nret;\n.loc 3 1 1\nret;") +
                         ".file 2 \"a.cu\"\n.file 7 \"b.cuh\", 123, 456\n"
                         ".section .debug_str { $info: .b8 95,90,0 }\n");
  const Function& f = m.functions.at(0);
  EXPECT_EQ(m.files.at(f.body[0].source.file), "a.cu");
  EXPECT_EQ(f.body[0].source.line, 17);
  EXPECT_EQ(m.files.at(f.body[1].source.file), "b.cuh");
  EXPECT_EQ(f.body[2].source.file, 0) << "a file number that nothing names";
}

TEST(Parser, ErrorsNameLineAndWhat) {
  EXPECT_EQ(error_of(kernel("ret")), "line 7: expected ';' before '}'");
  EXPECT_EQ(error_of(kernel("mov.b32 %r1, 0;")), "line 6: unknown register '%r1'");
  EXPECT_EQ(error_of(kernel("bra nowhere;")), "line 6: unknown name 'nowhere'");
  EXPECT_EQ(error_of(""), "line 1: no .version directive");
  EXPECT_EQ(error_of(header() + ".entry k() { ret;"),
            "line 4: expected an instruction before the end of the text");
  EXPECT_EQ(error_of(header() + ".global .b8 x[2] = {1,2,3};"), "line 4: too many initialisers");
  EXPECT_EQ(error_of(header() + ".global .b8 x[9999999999999];"), "line 4: variable too large");
  EXPECT_EQ(error_of(header() + ".global .b32 x = 1/0;"), "line 4: division by zero");
  EXPECT_EQ(error_of(kernel(".reg .b32 r; @r ret;")), "line 6: 'r' is not a predicate register");
}

TEST(Parser, RefusesDeepNesting) {
  EXPECT_NE(error_of(kernel(std::string(100000, '{'))), "");
  EXPECT_NE(error_of(kernel("x " + std::string(100000, '{') + ";")), "");
  EXPECT_NE(error_of(kernel("x " + std::string(100000, '-') + "1;")), "");
  EXPECT_NE(error_of(header() + ".global .b32 x = " + std::string(100000, '(') + ";"), "");
  EXPECT_NE(error_of(header() + ".global .b8 x[2][1000000000] = {{1}, {1}};"), "");
}

}  // namespace
}  // namespace gpu_emulator::ptx
