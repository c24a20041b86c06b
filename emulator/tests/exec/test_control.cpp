// Divergence and reconvergence, calls, barriers, deadlocks, modes.

#include <algorithm>
#include <functional>
#include <string>

#include "support/kernel_runner.h"

namespace gpu_emulator {
namespace {

// %r1: thread in the grid; its result is %r40, stored to the first argument.
struct Grid {
  uint32_t block = 128, grid = 2;
  Options options;
  std::vector<uint32_t> out;
  Counters counters;

  Report run(const std::string& ptx) {
    KernelRunner runner(ptx);
    out.assign(block * grid, 0xdddddddd);
    runner.add(out);
    runner.launch.block = {block, 1, 1};
    runner.launch.grid = {grid, 1, 1};
    const int threads = options.threads;
    runner.options = options;
    runner.options.threads = threads ? threads : 1;
    const Report report = runner.run();
    counters = runner.counters;
    return report;
  }
  Report run_body(const std::string& body, int shared = 0) {
    return run(
        kernel("mov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\nmov.u32 %r3, %ntid.x;\n"
               "mad.lo.u32 %r1, %r2, %r3, %r1;\nmov.u32 %r4, %tid.x;\n" +
                   body +
                   "mul.wide.u32 %rd2, %r1, 4;\nadd.u64 %rd3, %rd0, %rd2;\n"
                   "st.global.b32 [%rd3], %r40;\n",
               1, shared));
  }
  void expect(const std::function<uint32_t(uint32_t)>& want) {
    for (uint32_t i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], want(i)) << "thread " << i;
  }
};

TEST(Control, NestedLoopsAndBranches) {
  // A different trip count a lane, a break, a continue and a switch inside.
  const char* body = R"(
    mov.u32 %r40, %r1;
    rem.u32 %r10, %r1, 13;
    mov.u32 %r11, 0;
    LOOP:
    setp.ge.u32 %p0, %r11, %r10;
    @%p0 bra DONE;
    mad.lo.u32 %r40, %r40, 1664525, 1013904223;
    add.u32 %r11, %r11, 1;
    and.b32 %r12, %r40, 1;
    setp.eq.u32 %p1, %r12, 1;
    @%p1 bra LOOP;
    shr.u32 %r13, %r40, 7;
    rem.u32 %r14, %r13, 11;
    setp.eq.u32 %p2, %r14, 3;
    @%p2 bra DONE;
    mov.u32 %r15, 0;
    INNER:
    xor.b32 %r40, %r40, %r15;
    add.u32 %r15, %r15, 1;
    and.b32 %r16, %r40, 3;
    setp.lt.u32 %p3, %r15, %r16;
    @%p3 bra INNER;
    and.b32 %r17, %r40, 3;
    TABLE: .branchtargets CASE0, CASE1, CASE2, CASE3;
    brx.idx %r17, TABLE;
    CASE0: add.u32 %r40, %r40, 17; bra LOOP;
    CASE1: mul.lo.u32 %r40, %r40, 3; bra LOOP;
    CASE2: xor.b32 %r40, %r40, 85;
    CASE3: add.u32 %r40, %r40, %r11; bra LOOP;
    DONE:
  )";
  auto want = [](uint32_t x) {
    uint32_t h = x;
    const uint32_t n = x % 13;
    for (uint32_t i = 0; i < n;) {
      h = h * 1664525u + 1013904223u;
      ++i;
      if (h & 1) continue;
      if ((h >> 7) % 11 == 3) break;
      uint32_t j = 0;
      do {
        h ^= j;
        ++j;
      } while (j < (h & 3));
      switch (h & 3) {
        case 0:
          h += 17;
          break;
        case 1:
          h *= 3;
          break;
        case 2:
          h ^= 85;
          [[fallthrough]];
        default:
          h += i;
          break;
      }
    }
    return h;
  };
  for (const Mode mode : kModes) {
    SCOPED_TRACE(name_of(mode));
    Grid grid;
    grid.block = 100;  // the last warp is not full
    grid.options.mode = mode;
    grid.options.seed = 3;
    ASSERT_EQ(grid.run_body(body).text, "");
    grid.expect(want);
  }
}

TEST(Control, LanesMeetBehindABranch) {
  const char* body = R"(
    and.b32 %r10, %r1, 1;
    setp.eq.u32 %p0, %r10, 0;
    @%p0 bra EVEN;
    mov.u32 %r11, 3;
    bra MEET;
    EVEN: mov.u32 %r11, 4;
    MEET: activemask.b32 %r40;
  )";
  Grid grid;
  ASSERT_EQ(grid.run_body(body).text, "");
  grid.expect([](uint32_t) { return ~0u; });
}

TEST(Control, EarlyExit) {
  const char* body = R"(
    mov.u32 %r40, 1;
    and.b32 %r10, %r1, 3;
    setp.eq.u32 %p0, %r10, 2;
    @%p0 exit;
    setp.ge.u32 %p1, %r4, 96;
    @%p1 ret;
    bar.sync 0;
    activemask.b32 %r40;
  )";
  Grid grid;
  ASSERT_EQ(grid.run_body(body).text, "");
  grid.expect([](uint32_t i) { return i % 4 == 2 || i % 128 >= 96 ? 0xddddddddu : 0xbbbbbbbbu; });
}

// Lanes of one warp take a lock in turn. First a whole turn inside the loop, then the loop that
// spins until the lock is free: its lanes must not wait for each other behind the loop.
TEST(Control, SpinLocksInsideAWarp) {
  const char* inside = R"(
    mov.u32 %r10, 0;
    AGAIN:
    atom.acquire.cta.shared.cas.b32 %r11, [%r63], 0, 1;
    setp.ne.u32 %p0, %r11, 0;
    @%p0 bra SKIP;
    ld.shared.b32 %r40, [%r63+4];
    add.u32 %r12, %r40, 1;
    st.shared.b32 [%r63+4], %r12;
    atom.release.cta.shared.exch.b32 %r13, [%r63], 0;
    mov.u32 %r10, 1;
    SKIP:
    setp.eq.u32 %p1, %r10, 0;
    @%p1 bra AGAIN;
  )";
  const char* outside = R"(
    AGAIN:
    atom.acquire.cta.shared.cas.b32 %r11, [%r63], 0, 1;
    setp.ne.u32 %p0, %r11, 0;
    @%p0 bra AGAIN;
    ld.shared.b32 %r40, [%r63+4];
    add.u32 %r12, %r40, 1;
    st.shared.b32 [%r63+4], %r12;
    atom.release.cta.shared.exch.b32 %r13, [%r63], 0;
    bar.warp.sync -1;
  )";
  const std::string zero =
      "setp.eq.u32 %p2, %r4, 0;\nmov.u64 %rd9, 0;\n"
      "@%p2 st.shared.b64 [%r63], %rd9;\nbar.sync 0;\n";
  for (const char* body : {inside, outside}) {
    Grid grid;
    grid.grid = 1;
    grid.block = 64;
    ASSERT_EQ(grid.run_body(zero + body, 16).text, "");
    std::vector<uint32_t> tickets = grid.out;
    std::sort(tickets.begin(), tickets.end());
    for (uint32_t i = 0; i < 64; ++i) ASSERT_EQ(tickets[i], i);
  }
}

// ------------------------------------------------------------------------------------------- calls

const char kFunctions[] = R"(
.version 8.6
.target sm_80
.address_size 64
.func (.param .b32 result) factorial(.param .b32 n, .param .b64 unused)
{
  .reg .b32 %r<8>; .reg .pred %p<2>; .reg .b64 %rd<2>;
  ld.param.u32 %r1, [n];
  setp.gt.u32 %p1, %r1, 1;
  @%p1 bra MORE;
  mov.u32 %r2, 1;
  st.param.b32 [result], %r2;
  ret;
  MORE:
  sub.u32 %r3, %r1, 1;
  mov.u64 %rd1, 7;
  {
    .param .b32 a0; .param .b64 a1; .param .b32 r0;
    st.param.b32 [a0], %r3;
    st.param.b64 [a1], %rd1;
    call.uni (r0), factorial, (a0, a1);
    ld.param.b32 %r4, [r0];
  }
  mul.lo.u32 %r5, %r1, %r4;
  st.param.b32 [result], %r5;
  ret;
}
.visible .entry k(.param .u64 p0)
{
  .reg .b32 %r<8>; .reg .b64 %rd<8>;
  ld.param.u64 %rd1, [p0];
  mov.u32 %r1, %tid.x;
  rem.u32 %r2, %r1, 9;
  mov.u64 %rd3, 1;
  {
    .param .b32 a0; .param .b64 a1; .param .b32 r0;
    st.param.b32 [a0], %r2;
    st.param.b64 [a1], %rd3;
    call (r0), factorial, (a0, a1);
    ld.param.b32 %r3, [r0];
  }
  mul.wide.u32 %rd2, %r1, 4;
  add.u64 %rd2, %rd1, %rd2;
  st.global.b32 [%rd2], %r3;
  ret;
}
)";

TEST(Control, CallsRecurseToDifferentDepths) {
  Grid grid;
  grid.grid = 1;
  grid.block = 64;
  ASSERT_EQ(grid.run(kFunctions).text, "");
  const uint32_t factorials[] = {1, 1, 2, 6, 24, 120, 720, 5040, 40320};
  grid.expect([&](uint32_t i) { return factorials[i % 9]; });
}

// ---------------------------------------------------------------------------------------- barriers

TEST(Barriers, ReductionsOverTheCta) {
  const char* body = R"(
    and.b32 %r10, %r4, 3;
    setp.eq.u32 %p0, %r10, 1;
    barrier.red.popc.aligned.u32 %r11, 0, %p0;
    barrier.red.or.aligned.pred %p1, 0, %p0;
    barrier.red.and.aligned.pred %p2, 0, %p0;
    selp.u32 %r12, 256, 0, %p1;
    selp.u32 %r13, 512, 0, %p2;
    add.u32 %r40, %r11, %r12;
    add.u32 %r40, %r40, %r13;
  )";
  Grid grid;
  ASSERT_EQ(grid.run_body(body).text, "");
  grid.expect([](uint32_t) { return 32 + 256; });
}

TEST(Barriers, ProducersArriveConsumersWait) {
  const char* body = R"(
    shr.u32 %r10, %r4, 6;
    shl.b32 %r11, %r4, 2;
    and.b32 %r11, %r11, 255;
    add.u32 %r11, %r63, %r11;
    mov.u32 %r40, 0;
    setp.eq.u32 %p0, %r10, 1;
    @%p0 bra CONSUMER;
    st.shared.b32 [%r11], %r1;
    bar.arrive 3, 128;
    bra DONE;
    CONSUMER:
    bar.sync 3, 128;
    ld.shared.b32 %r40, [%r11];
    DONE:
  )";
  for (const Mode mode : kModes) {
    Grid grid;
    grid.options.mode = mode;
    ASSERT_EQ(grid.run_body(body, 256).text, "");
    grid.expect([](uint32_t i) { return i % 128 >= 64 ? i - 64 : 0; });
  }
}

TEST(Barriers, LanesMayComeOneByOneUnlessAligned) {
  auto body = [](const char* barrier) {
    return std::string(
               "and.b32 %r10, %r4, 1;\nsetp.eq.u32 %p0, %r10, 0;\nmov.u32 %r40, 1;\n"
               "@%p0 bra EVEN;\n") +
           barrier + ";\nbra DONE;\nEVEN: " + barrier + ";\nDONE:\n";
  };
  Grid grid;
  EXPECT_EQ(grid.run_body(body("barrier.sync 0")).text, "");
  EXPECT_EQ(grid.run_body(body("bar.sync 0")).kind, "aligned_barrier");
}

// A pair of warps votes and goes on; one of them has not been told yet when another pair votes at
// the same barrier.
TEST(Barriers, VotesOfWarpsThatComeLater) {
  Grid grid;
  grid.grid = 1;
  const Report report = grid.run_body(R"(
    shr.u32 %r10, %r4, 5;
    setp.lt.u32 %p0, %r4, 64;
    setp.eq.u32 %p1, %r10, 1;
    setp.eq.u32 %p2, %r10, 3;
    setp.gt.u32 %p3, %r10, 1;
    @%p2 barrier.cta.arrive 3, 64;
    @%p1 barrier.cta.sync 3, 64;
    @%p3 barrier.cta.sync 2, 96;
    barrier.cta.red.popc.u32 %r40, 1, 64, %p0;
    @%p1 barrier.cta.arrive 2, 96;
  )");
  ASSERT_EQ(report.text, "");
  grid.expect([](uint32_t thread) { return thread < 64 ? 64 : 0; });
}

struct Misuse {
  const char *body, *kind, *text;
};

TEST(Barriers, MisuseAndDeadlockAreReported) {
  const Misuse cases[] = {
      {"bar.sync 16;\n", "barrier", "no barrier 16"},
      {"bar.sync 1, 33;\n", "barrier", "multiple of 32"},
      {"setp.lt.u32 %p0, %r4, 32;\n@%p0 bra A;\nbar.sync 1, 128;\nbra B;\nA: bar.sync 1, 64;\nB:\n",
       "barrier", "expects"},
      {"setp.lt.u32 %p0, %r4, 32;\n@%p0 bra A;\nbar.sync 2, 128;\nA:\n", "deadlock",
       "waits at barrier 2: 96 threads of 128 have arrived"},
      {"setp.lt.u32 %p0, %r4, 32;\n@%p0 bra A;\nbar.sync 1;\nbra B;\nA: bar.sync 2;\nB:\n",
       "deadlock", "barrier 1: 96 threads of 128"},
      {"setp.lt.u32 %p0, %r4, 16;\n@%p0 bra.uni A;\nA:\n", "uniform_branch", "bra.uni"},
      {"setp.lt.u32 %p0, %r4, 16;\n@%p0 bra A;\nbar.warp.sync -1;\nbra B;\nA: exit;\nB: trap;\n",
       "trap", "trap"},
      {"mov.u32 %r10, 5;\nfoo.bar.s32 %r40, %r10;\n", "unsupported", "foo.bar.s32"},
      {"mov.u32 %r10, %envreg0;\n", "unsupported", "%envreg0"},
  };
  for (const Misuse& c : cases) {
    SCOPED_TRACE(c.body);
    Grid grid;
    grid.grid = 1;
    const Report report = grid.run_body(c.body);
    EXPECT_EQ(report.kind, c.kind) << report.text;
    EXPECT_NE(report.text.find(c.text), std::string::npos) << report.text;
    EXPECT_NE(report.text.find("kernel k, CTA (0,0,0), warp"), std::string::npos) << report.text;
    EXPECT_NE(report.text.find("PTX line"), std::string::npos) << report.text;
    EXPECT_NE(report.cuda_error, 0);
  }
}

// -------------------------------------------------------------------------------------- scheduling

// Each CTA waits for the one behind it: more of them must be resident than there are host threads.
TEST(Scheduling, CtasWaitForLaterOnes) {
  const char* body = R"(
    mov.u32 %r40, 7;
    setp.ne.u32 %p0, %r4, 0;
    @%p0 bra DONE;
    mov.u32 %r10, %nctaid.x;
    sub.u32 %r10, %r10, 1;
    mul.wide.u32 %rd5, %r2, 128;
    add.u64 %rd6, %rd0, %rd5;
    setp.eq.u32 %p1, %r2, %r10;
    @%p1 bra SET;
    WAIT:
    nanosleep.u32 20;
    ld.acquire.gpu.global.b32 %r11, [%rd6+132];
    setp.ne.u32 %p2, %r11, 9;
    @%p2 bra WAIT;
    SET:
    st.release.gpu.global.b32 [%rd6+4], 9;
    DONE:
    setp.eq.u32 %p3, %r4, 1;
    @%p3 exit;
  )";
  Grid grid;
  grid.block = 32;
  grid.grid = 6;
  ASSERT_EQ(grid.run_body(body).text, "");
  grid.expect([](uint32_t i) { return i % 32 == 1 ? 9 : 7; });
}

TEST(Scheduling, InstructionLimitEndsALivelock) {
  Grid grid;
  grid.grid = 1;
  grid.options.max_instructions = 100000;
  const Report report = grid.run_body("HERE: bra HERE;\n");
  EXPECT_EQ(report.kind, "instruction_limit");
}

// cp.async without its wait: eager finds the bytes there, late finds poison.
TEST(Scheduling, LateModeDelaysCopiesUntilTheirWait) {
  auto body = [](const char* wait) {
    return std::string(
               "shl.b32 %r10, %r4, 2;\nadd.u32 %r11, %r63, %r10;\ncvt.u64.u32 %rd5, %r10;\n"
               "add.u64 %rd6, %rd0, %rd5;\nmov.u32 %r12, 77;\nst.global.b32 [%rd6], %r12;\n"
               "cp.async.ca.shared.global [%r11], [%rd6], 4;\ncp.async.commit_group;\n") +
           wait + "ld.shared.b32 %r40, [%r11];\ncp.async.wait_all;\n";
  };
  for (const Mode mode : {Mode::kEager, Mode::kLate}) {
    Grid grid;
    grid.grid = 1;
    grid.options.mode = mode;
    grid.options.checks = exec::Checks::memory();
    ASSERT_EQ(grid.run_body(body("cp.async.wait_group 0;\n"), 512).text, "");
    grid.expect([](uint32_t) { return 77; });
    ASSERT_EQ(grid.run_body(body("cp.async.wait_group 1;\n"), 512).text, "");
    grid.expect([&](uint32_t) { return mode == Mode::kEager ? 77 : ~0u; });
  }
}

TEST(Scheduling, CopiesFillWithZeros) {
  for (const Mode mode : kModes) {
    for (int bytes : {4, 8, 16}) {
      for (int given : {0, 4, bytes}) {
        const std::string n = std::to_string(bytes);
        const std::string body =
            "setp.ne.u32 %p0, %r4, 0;\nmov.u32 %r40, 0;\n@%p0 bra DONE;\n"
            "mov.u64 %rd5, -1;\nst.global.v2.b64 [%rd0], {%rd5, %rd5};\nmov.u32 %r10, " +
            std::to_string(given) + ";\ncp.async." + (bytes == 16 ? "cg" : "ca") +
            ".shared.global [%r63], [%rd0], " + n +
            ", %r10;\ncp.async.wait_all;\n"
            "ld.shared.b32 %r11, [%r63];\nld.shared.b32 %r12, [%r63+" +
            std::to_string(bytes - 4) +
            "];\npopc.b32 %r11, %r11;\npopc.b32 %r12, %r12;\n"
            "mad.lo.u32 %r40, %r11, 100, %r12;\nDONE: bar.warp.sync -1;\n";
        Grid grid;
        grid.grid = 1;
        grid.block = 32;
        grid.options.mode = mode;
        ASSERT_EQ(grid.run_body(body, 64).text, "");
        const uint32_t first = given >= 4 ? 32 : 0, last = given == bytes ? 32 : 0;
        EXPECT_EQ(grid.out[0], first * 100 + last) << bytes << " bytes, " << given << " given";
      }
    }
  }
}

// The order in which warps draw tickets: the same again with the same seed, another with another.
TEST(Scheduling, RandomModeReplays) {
  const char* body =
      "mov.u32 %r10, 0;\nL: add.u32 %r10, %r10, 1;\nsetp.lt.u32 %p0, %r10, 3000;\n"
      "@%p0 bra L;\natom.shared.inc.u32 %r40, [%r63], 65535;\n";
  const std::string zero =
      "setp.eq.u32 %p2, %r4, 0;\nmov.u32 %r9, 0;\n"
      "@%p2 st.shared.b32 [%r63], %r9;\nbar.sync 0;\n";
  auto tickets = [&](uint64_t seed) {
    Grid grid;
    grid.grid = 1;
    grid.block = 256;
    grid.options.mode = Mode::kRandom;
    grid.options.seed = seed;
    EXPECT_EQ(grid.run_body(zero + body, 16).text, "");
    return grid.out;
  };
  const auto first = tickets(11);
  EXPECT_EQ(first, tickets(11));
  bool differs = false;
  for (uint64_t seed = 12; seed < 16; ++seed) differs |= tickets(seed) != first;
  EXPECT_TRUE(differs);
}

TEST(Scheduling, LaunchesBeyondTheLimitsAreRejected) {
  Grid grid;
  grid.block = 1056;
  EXPECT_EQ(grid.run_body("mov.u32 %r40, 0;\n").kind, "invalid_launch");
  grid.block = 32;
  EXPECT_EQ(grid.run_body("mov.u32 %r40, 0;\n", 240 * 1024).kind, "invalid_launch");
}

}  // namespace
}  // namespace gpu_emulator
