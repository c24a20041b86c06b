// Divergence and reconvergence, calls, modes.

#include <algorithm>
#include <string>

#include "support/grid.h"

namespace gpu_emulator {
namespace {

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

// Lane 0 is let go from behind the loop; what the others do between the loop and there is done
// once.
TEST(Control, LanesThatComeAfterOthersWereLetGo) {
  Grid grid;
  grid.block = 32;
  ASSERT_EQ(grid.run_body(R"(
    mov.u32 %r40, 0;
    setp.eq.u32 %p0, %r4, 0;
    @%p0 st.shared.b32 [%r63], 0;
    bar.sync 0;
    @%p0 bra BEHIND;
    SPIN:
    ld.acquire.cta.shared.b32 %r13, [%r63];
    setp.eq.u32 %p2, %r13, 0;
    @%p2 bra SPIN;
    add.u32 %r40, %r40, 1;
    BEHIND:
    @%p0 st.release.cta.shared.b32 [%r63], 1;
    add.u32 %r40, %r40, 10;
  )",
                          64)
                .text,
            "");
  grid.expect([](uint32_t thread) { return thread % 32 == 0 ? 10 : 11; });
}

// Lane 0 polls for so long that the others are let go on; bar.warp.sync of all brings them together
// again, for an instruction that takes all lanes at once.
TEST(Control, LanesThatWereLetGoMeetAtABarrierOfTheWarp) {
  for (const Mode mode : kModes) {
    SCOPED_TRACE(name_of(mode));
    Grid grid;
    grid.grid = 1;
    grid.block = 64;
    grid.options.mode = mode;
    ASSERT_EQ(grid.run_body(R"(
      setp.lt.u32 %p3, %r4, 32;
      and.b32 %r20, %r4, 31;
      shl.b32 %r21, %r20, 2;
      add.u32 %r21, %r21, %r63;
      @%p3 st.shared.b32 [%r21+64], %r4;
      setp.eq.u32 %p0, %r4, 0;
      @%p0 st.shared.b32 [%r63], 0;
      bar.sync 0;
      @%p3 bra FIRST;
      setp.ne.u32 %p0, %r20, 0;
      @%p0 bra MEET;
      SPIN:
      ld.acquire.cta.shared.b32 %r13, [%r63];
      setp.eq.u32 %p2, %r13, 0;
      @%p2 bra SPIN;
      MEET:
      bar.warp.sync -1;
      and.b32 %r22, %r20, 7;
      shl.b32 %r22, %r22, 4;
      add.u32 %r22, %r22, %r63;
      ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r40}, [%r22+64];
      bra END;
      FIRST:
      mov.u32 %r14, 0;
      mov.u32 %r40, 100;
      LONG:
      add.u32 %r14, %r14, 1;
      setp.lt.u32 %p2, %r14, 20000;
      @%p2 bra LONG;
      @%p0 st.release.cta.shared.b32 [%r63], 1;
      END:
      bar.sync 0;
    )",
                            256)
                  .text,
              "");
    grid.expect([](uint32_t thread) { return thread < 32 ? 100 : thread - 32; });
  }
}

TEST(Control, FaultsAreReported) {
  const Misuse cases[] = {
      {"setp.lt.u32 %p0, %r4, 16;\n@%p0 bra.uni A;\nA:\n", "uniform_branch", "bra.uni"},
      {"setp.lt.u32 %p0, %r4, 16;\n@%p0 bra A;\nbar.warp.sync -1;\nbra B;\nA: exit;\nB: trap;\n",
       "trap", "trap"},
      {"mov.u32 %r10, 5;\nfoo.bar.s32 %r40, %r10;\n", "unsupported", "foo.bar.s32"},
      {"mov.u32 %r10, %envreg0;\n", "unsupported", "%envreg0"},
  };
  for (const Misuse& c : cases) expect_misuse(c);
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
