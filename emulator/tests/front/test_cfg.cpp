#include "ptx/cfg.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

#include "ptx/parser.h"

namespace gpu_emulator::ptx {
namespace {

Function parse_body(const std::string& body) {
  return parse(".version 9.0\n.target sm_80\n.entry k() {\n.reg .pred p; .reg .b32 %r;\n" + body +
               "\n}")
      .functions.at(0);
}

std::vector<int> points(const std::string& body) { return reconvergence_points(parse_body(body)); }

TEST(Cfg, StraightLine) {
  EXPECT_EQ(points("add; add; ret;"), (std::vector<int>{-1, -1, -1}));
  EXPECT_EQ(points(""), std::vector<int>{});
}

TEST(Cfg, IfThenElse) {
  EXPECT_EQ(points("@p bra E; a; bra J; E: b; J: ret;"), (std::vector<int>{4, -1, 4, -1, -1}));
}

TEST(Cfg, Loop) { EXPECT_EQ(points("L: a; @p bra L; ret;"), (std::vector<int>{-1, 2, -1})); }

TEST(Cfg, NestedIfInLoop) {
  EXPECT_EQ(points("L: @p bra S; a; S: @p bra L; ret;"), (std::vector<int>{2, -1, 3, -1}));
}

TEST(Cfg, EarlyReturnMeetsAtTheEnd) {
  // Lanes that return never come back: those that go on and those that branch meet at the end.
  EXPECT_EQ(points("@p bra A; ret; A: b; ret;"), (std::vector<int>{4, -1, -1, -1}));
  EXPECT_EQ(points("@p bra A; @p ret; A: b; ret;"), (std::vector<int>{4, -1, -1, -1}));
}

TEST(Cfg, BranchTable) {
  EXPECT_EQ(points("t: .branchtargets A, B, C;\nbrx.idx %r, t; A: a; bra J; B: b; C: c; J: ret;"),
            (std::vector<int>{5, -1, 5, -1, -1, -1}));
}

TEST(Cfg, EndlessLoopHasMeetingPoints) {
  EXPECT_EQ(points("L: @p bra S; a; S: b; bra L;"), (std::vector<int>{2, -1, -1, 4}));
}

TEST(Cfg, BranchToTheEnd) { EXPECT_EQ(points("@p bra E; a; E:"), (std::vector<int>{2, -1})); }

// By definition: b post-dominates a if no way from a to the end avoids b.
bool reaches_end_without(const ControlFlowGraph& cfg, int from, int avoided) {
  std::vector<char> seen(cfg.successors.size(), 0);
  std::vector<int> work = {from};
  while (!work.empty()) {
    const int block = work.back();
    work.pop_back();
    if (block == avoided || seen[block]) continue;
    seen[block] = 1;
    if (block == cfg.exit()) return true;
    work.insert(work.end(), cfg.successors[block].begin(), cfg.successors[block].end());
  }
  return false;
}

TEST(Cfg, RandomGraphsAgreeWithTheDefinition) {
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    const int lines = 3 + static_cast<int>(random() % 12);
    std::string body;
    for (int i = 0; i < lines; ++i) {
      body += "L" + std::to_string(i) + ": ";
      const std::string target = "L" + std::to_string(random() % lines);
      const int choice = static_cast<int>(random() % 6);
      // The last line returns, and every other one can go on: the end is in reach of all.
      body += choice < 3 && i + 1 < lines ? "@p bra " + target + ";\n" : "nop;\n";
    }
    const ControlFlowGraph cfg = build_cfg(parse_body(body));
    const std::vector<int> immediate = immediate_post_dominators(cfg);
    for (int a = 0; a < cfg.exit(); ++a) {
      EXPECT_FALSE(reaches_end_without(cfg, a, immediate[a])) << body << a;
      for (int b = 0; b <= cfg.exit(); ++b) {
        // Every other post-dominator of a is one of immediate[a] too.
        const bool other = b != a && b != immediate[a] && !reaches_end_without(cfg, a, b);
        EXPECT_FALSE(other && reaches_end_without(cfg, immediate[a], b)) << body << a << " " << b;
      }
    }
  }
}

}  // namespace
}  // namespace gpu_emulator::ptx
