// Barriers of the CTA: whom they count, whom they order, what is reported.

#include <string>

#include "support/grid.h"

namespace gpu_emulator {
namespace {

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
  grid.options.checks = exec::Checks::parse("all-aligned_barrier");
  EXPECT_EQ(grid.run_body(body("bar.sync 0")).text, "");
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

// Eager, late, and random schedules.
std::vector<Options> all_modes() {
  std::vector<Options> list(2);
  list[1].mode = Mode::kLate;
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    list.emplace_back().mode = Mode::kRandom;
    list.back().seed = seed;
  }
  return list;
}

// One CTA of `block` threads, in every mode.
void expect_results(const std::string& body, uint32_t block,
                    const std::function<uint32_t(uint32_t)>& want, int shared = 4096) {
  for (const Options& options : all_modes()) {
    SCOPED_TRACE(std::string(name_of(options.mode)) + " " + std::to_string(options.seed));
    Grid grid;
    grid.grid = 1;
    grid.block = block;
    grid.options = options;
    ASSERT_EQ(grid.run_body(body, shared).text, "");
    grid.expect(want);
  }
}

// ---------------------------------------------------------------------- arrivals are counted

// Each syncs on its own barrier and arrives at the other's; that of the first one is primed.
TEST(Barriers, TwoWarpgroupsTakeTurns) {
  expect_results(R"(
    shr.u32 %r10, %r4, 7;
    and.b32 %r11, %r4, 127;
    shl.b32 %r11, %r11, 2;
    add.u32 %r11, %r63, %r11;
    add.u32 %r12, %r10, 1;
    sub.u32 %r13, 2, %r10;
    setp.eq.u32 %p0, %r10, 0;
    mov.u32 %r14, 0;
    @%p0 st.shared.b32 [%r11], 1;
    @!%p0 bar.arrive 1, 256;
    TURN:
    bar.sync %r12, 256;
    ld.shared.b32 %r40, [%r11];
    mad.lo.u32 %r40, %r40, 3, %r10;
    st.shared.b32 [%r11], %r40;
    bar.arrive %r13, 256;
    add.u32 %r14, %r14, 1;
    setp.lt.u32 %p1, %r14, 5;
    @%p1 bra TURN;
  )",
                 256, [](uint32_t thread) {
                   uint32_t value = 1, last = 0;
                   for (int turn = 0; turn < 10; ++turn) {
                     value = 3 * value + turn % 2;
                     if (turn % 2 == static_cast<int>(thread / 128)) last = value;
                   }
                   return last;
                 });
}

// Eight warps arrive at a barrier for nine; one of them also syncs, and stores the tile.
TEST(Barriers, OneOfThoseThatArrivedAlsoSyncs) {
  expect_results(
      R"(
    mov.u32 %r40, 7;
    shl.b32 %r10, %r4, 2;
    add.u32 %r10, %r63, %r10;
    st.shared.b32 [%r10], %r4;
    bar.arrive 9, 288;
    shr.u32 %r11, %r4, 5;
    setp.ne.u32 %p0, %r11, 3;
    @%p0 bra DONE;
    bar.sync 9, 288;
    mov.u32 %r40, 0;
    mov.u32 %r12, 0;
    ROW:
    shl.b32 %r13, %r12, 7;
    and.b32 %r14, %r4, 31;
    shl.b32 %r14, %r14, 2;
    add.u32 %r13, %r13, %r14;
    add.u32 %r13, %r63, %r13;
    ld.shared.b32 %r15, [%r13];
    add.u32 %r40, %r40, %r15;
    add.u32 %r12, %r12, 1;
    setp.lt.u32 %p1, %r12, 8;
    @%p1 bra ROW;
    DONE:
  )",
      256, [](uint32_t thread) { return thread / 32 == 3 ? 8 * (thread % 32) + 32 * 28 : 7; });
}

// The four warps of a warpgroup arrive and sync: eight arrivals, without the other warpgroup.
TEST(Barriers, AWarpgroupArrivesAndSyncs) {
  expect_results(R"(
    mov.u32 %r40, 7;
    setp.ge.u32 %p0, %r4, 128;
    @%p0 bra DONE;
    shl.b32 %r10, %r4, 2;
    add.u32 %r10, %r63, %r10;
    xor.b32 %r11, %r10, 448;
    st.shared.b32 [%r10], %r4;
    bar.arrive 9, 256;
    st.shared.b32 [%r10+512], %r4;
    bar.sync 9, 256;
    ld.shared.b32 %r12, [%r11];
    ld.shared.b32 %r13, [%r11+512];
    add.u32 %r40, %r12, %r13;
    bar.arrive 9, 256;
    bar.sync 9, 256;
    DONE:
  )",
                 256, [](uint32_t thread) { return thread < 128 ? 2 * (thread ^ 112) : 7; });
}

TEST(Barriers, AWarpArrivesAsOftenAsItLikes) {
  expect_results("bar.arrive 5, 96;\nbar.arrive 5, 96;\nmov.u32 %r40, 4;\nbar.sync 5, 96;\n", 32,
                 [](uint32_t) { return 4; });
}

TEST(Barriers, ArrivalsWithoutACountCountOnce) {
  const std::string again = "arrives again before the others came";
  for (const std::string second : {"bar.arrive 1", "bar.sync 1"}) {
    Grid grid;
    grid.block = 64;
    const std::string body =
        "mov.u32 %r40, 0;\nsetp.lt.u32 %p0, %r4, 32;\n@!%p0 bra A;\n"
        "bar.arrive 1;\n" +
        second + ";\nbra B;\nA: bar.sync 2, 32;\nbar.sync 1;\nB:\n";
    const Report report = grid.run_body(body);
    EXPECT_EQ(report.kind, "barrier_again");
    EXPECT_NE(report.text.find(again), std::string::npos) << report.text;
    grid.options.checks = exec::Checks::parse("all-barrier_again");
    EXPECT_NE(grid.run_body(body).kind, "barrier_again");
  }
  // With a count first: whoever names none asks for all.
  Grid grid;
  grid.block = 96;
  const Report report = grid.run_body(
      "mov.u32 %r40, 0;\nsetp.lt.u32 %p0, %r4, 32;\n@!%p0 bra A;\n"
      "bar.arrive 1, 96;\nbar.arrive 1, 96;\nbar.sync 2, 32;\nbra B;\nA: bar.sync 1;\nB:\n");
  EXPECT_EQ(report.kind, "barrier_again");
  EXPECT_NE(report.text.find("warp 0 " + again), std::string::npos) << report.text;
}

// Of a count of 0, and of the number of all threads, PTX says that all take part.
TEST(Barriers, AllThreadsHaveThreeNames) {
  expect_results(R"(
    mov.u32 %r40, 0;
    shr.u32 %r10, %r4, 5;
    shl.b32 %r11, %r4, 2;
    add.u32 %r11, %r63, %r11;
    xor.b32 %r12, %r11, 384;
    st.shared.b32 [%r11], %r4;
    setp.eq.u32 %p0, %r10, 0;
    setp.eq.u32 %p1, %r10, 1;
    mov.u32 %r13, 0;
    @%p0 bra ZERO;
    @%p1 bra REGISTER;
    setp.eq.u32 %p2, %r10, 2;
    @%p2 bra COUNT;
    bar.sync 1;
    bra DONE;
    ZERO: bar.sync 1, 0;
    bra DONE;
    REGISTER: bar.sync 1, %r13;
    bra DONE;
    COUNT: bar.sync 1, 128;
    DONE:
    ld.shared.b32 %r40, [%r12];
  )",
                 128, [](uint32_t thread) { return thread ^ 96; });
}

// ---------------------------------------------------------------------- a warp arrives as one

// One half of the warps comes first, then the other; on each side of a branch, and under a guard.
TEST(Barriers, HalvesOfAWarpArriveTogether) {
  const std::string store =
      "and.b32 %r10, %r4, 1;\nsetp.eq.u32 %p0, %r10, 0;\nshl.b32 %r11, %r4, 2;\n"
      "add.u32 %r11, %r63, %r11;\nxor.b32 %r12, %r11, 128;\nst.shared.b32 [%r11], %r4;\n";
  const std::string load = "ld.shared.b32 %r40, [%r12];\n";
  auto expect_exchange = [&](const std::string& barriers) {
    SCOPED_TRACE(barriers);
    expect_results(store + barriers + load, 64, [](uint32_t thread) { return thread ^ 32; });
  };
  expect_exchange("@%p0 bra A;\nbarrier.sync 1, 64;\nbra B;\nA: barrier.sync 1, 64;\nB:\n");
  expect_exchange("@%p0 barrier.sync 1, 64;\n@!%p0 barrier.sync 1, 64;\n");
  expect_exchange("@%p0 barrier.sync 1;\n@!%p0 barrier.sync 1;\n");
  expect_exchange("@%p0 barrier.arrive 1, 128;\n@!%p0 barrier.arrive 1, 128;\nbar.sync 1, 128;\n");
  expect_exchange(
      "@%p0 barrier.red.popc.u32 %r13, 1, %p0;\n@!%p0 barrier.red.popc.u32 %r13, 1, %p0;\n"
      "sub.u32 %r13, %r13, 32;\nadd.u32 %r12, %r12, %r13;\n");
}

TEST(Barriers, LanesThatExitAreNotWaitedFor) {
  expect_results(R"(
    mov.u32 %r40, 0;
    mov.u32 %r10, 0;
    and.b32 %r11, %r4, 31;
    setp.lt.u32 %p0, %r11, 16;
    @%p0 bra COME;
    SPIN:
    add.u32 %r10, %r10, 1;
    setp.lt.u32 %p1, %r10, 50;
    @%p1 bra SPIN;
    mul.wide.u32 %rd2, %r1, 4;
    add.u64 %rd3, %rd0, %rd2;
    st.global.b32 [%rd3], 5;
    exit;
    COME:
    barrier.sync 1, 64;
    mov.u32 %r40, 6;
  )",
                 64, [](uint32_t thread) { return thread % 32 < 16 ? 6 : 5; });
}

// Half of warp 0 comes, and waits for the other half, which comes only after warps 1 and 2 have
// met at the same barrier: it arrives in the next phase, with warp 3.
TEST(Barriers, AHalfIsNoArrival) {
  expect_results(R"(
    mov.u32 %r40, 0;
    shr.u32 %r10, %r4, 5;
    setp.eq.u32 %p0, %r4, 32;
    @%p0 st.shared.b32 [%r63], 0;
    bar.sync 0;
    setp.eq.u32 %p1, %r10, 0;
    @%p1 bra HALVES;
    setp.eq.u32 %p2, %r10, 3;
    @%p2 bra LATE;
    barrier.sync 1, 64;
    @%p0 st.release.cta.shared.b32 [%r63], 1;
    bra DONE;
    HALVES:
    setp.lt.u32 %p3, %r4, 16;
    @%p3 bra COME;
    WAIT:
    ld.acquire.cta.shared.b32 %r11, [%r63];
    setp.eq.u32 %p4, %r11, 0;
    @%p4 bra WAIT;
    COME:
    barrier.sync 1, 64;
    bra DONE;
    LATE:
    ld.acquire.cta.shared.b32 %r11, [%r63];
    setp.eq.u32 %p4, %r11, 0;
    @%p4 bra LATE;
    barrier.sync 1, 64;
    DONE:
    mov.u32 %r40, 3;
  )",
                 128, [](uint32_t) { return 3; });
}

// Lane 0 waits behind the loop for the lanes that spin in it, until it is let go alone; so it comes
// to the aligned barrier alone, and still waits there for the other warp.
TEST(Barriers, AlignedOnesOfLanesThatWereLetGo) {
  expect_results(R"(
    shl.b32 %r11, %r4, 2;
    add.u32 %r11, %r63, %r11;
    xor.b32 %r12, %r11, 128;
    setp.eq.u32 %p0, %r4, 0;
    setp.eq.u32 %p3, %r4, 1;
    @%p0 st.shared.b32 [%r63+1024], 0;
    @%p0 st.shared.b32 [%r63+1028], 0;
    bar.sync 0;
    setp.ge.u32 %p1, %r4, 32;
    @%p1 bra OTHER;
    @%p0 bra BEHIND;
    SPIN:
    ld.acquire.cta.shared.b32 %r13, [%r63+1024];
    setp.eq.u32 %p2, %r13, 0;
    @%p2 bra SPIN;
    BEHIND:
    @%p0 st.release.cta.shared.b32 [%r63+1024], 1;
    @%p3 st.release.cta.shared.b32 [%r63+1028], 1;
    bra MEET;
    OTHER:
    ld.acquire.cta.shared.b32 %r13, [%r63+1028];
    setp.eq.u32 %p2, %r13, 0;
    @%p2 bra OTHER;
    MEET:
    st.shared.b32 [%r11], %r4;
    bar.sync 1, 64;
    ld.shared.b32 %r40, [%r12];
  )",
                 64, [](uint32_t thread) { return thread ^ 32; });
}

// --------------------------------------------------------------------------------- reports

TEST(Barriers, MisuseAndDeadlockAreReported) {
  const Misuse cases[] = {
      {"bar.sync 16;\n", "barrier", "no barrier 16"},
      {"bar.sync 1, 33;\n", "barrier", "multiple of 32"},
      {"mov.u32 %r10, 0;\nbar.arrive 1, %r10;\n", "barrier", "not 0, in barrier.arrive"},
      {"setp.lt.u32 %p0, %r4, 32;\n@%p0 bra A;\nbar.sync 1, 128;\nbra B;\nA: bar.sync 1, 64;\nB:\n",
       "barrier", "expects"},
      {"setp.lt.u32 %p0, %r4, 32;\n@%p0 bra A;\nbar.sync 1;\nbra B;\nA: bar.sync 1, 96;\nB:\n",
       "barrier", "expects"},
      {"setp.lt.u32 %p0, %r4, 32;\n@%p0 bra A;\nbar.sync 2, 128;\nA:\n", "deadlock",
       "waits at barrier 2: 96 threads of 128 have arrived: warps 1, 2, 3;"},
      {"setp.lt.u32 %p0, %r4, 32;\n@%p0 bra A;\nbar.sync 1;\nbra B;\nA: bar.sync 2;\nB:\n",
       "deadlock", "barrier 1: 96 threads of 128 have arrived: warps 1, 2, 3;"},
      {"setp.lt.u32 %p0, %r4, 16;\n@!%p0 bra A;\nbarrier.sync 1, 128;\nA: barrier.sync 2, 128;\n",
       "deadlock", "barrier 1: not all lanes of this warp have come"},
      // Those that arrived more than once, in this phase and in the one before.
      {"bar.arrive 3, 288;\nsetp.lt.u32 %p0, %r4, 96;\n@%p0 bra A;\nbar.arrive 3, 288;\n"
       "bar.arrive 3, 288;\nbar.sync 3, 288;\nA:\n",
       "deadlock", "224 threads of 288 have arrived: warps 0, 1, 2, 3 (4 times);"},
      {"setp.lt.u32 %p0, %r4, 32;\n@!%p0 bra A;\nbar.arrive 1, 64;\nbar.arrive 1, 64;\n"
       "bra B;\nA: bar.sync 2, 96;\nsetp.lt.u32 %p1, %r4, 64;\n@!%p1 bra B;\nbar.sync 1, 64;\nB:\n",
       "deadlock", "32 threads of 64 have arrived: warps 1; in the phase before, warps 0 (twice);"},
  };
  for (const Misuse& c : cases) expect_misuse(c);
}

}  // namespace
}  // namespace gpu_emulator
