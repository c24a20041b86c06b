// barrier.cluster, distributed shared memory, st.async, red.async, setmaxnreg, stmatrix.

#include "support/kernel_runner.h"

namespace gpu_emulator {
namespace {

const char* kClusterSync = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n";

void run_cluster(KernelRunner& runner, uint32_t ctas, Mode mode) {
  runner.launch.grid = runner.launch.cluster = {ctas, 1, 1};
  runner.options.mode = mode;
}

TEST(Clusters, ReadsAndAddsInTheNextCtasSharedMemory) {
  const std::string body = std::string(R"(
    mov.u32 %r0, %cluster_ctarank;
    mov.u32 %r1, %cluster_nctarank;
    add.u32 %r2, %r0, 10;
    st.shared.u32 [%r63], %r2;
    st.shared.u32 [%r63+4], 0;
  )") + kClusterSync + R"(
    add.u32 %r3, %r0, 1;
    rem.u32 %r3, %r3, %r1;
    mapa.shared::cluster.u32 %r4, %r63, %r3;
    ld.shared::cluster.u32 %r5, [%r4];
    getctarank.shared::cluster.u32 %r6, %r4;
    atom.shared::cluster.add.u32 %r7, [%r4+4], %r2;
    cvta.shared.u64 %rd1, smem;
    mapa.u64 %rd2, %rd1, %r3;
    ld.u32 %r8, [%rd2];
  )" + kClusterSync + R"(
    ld.shared.u32 %r9, [%r63+4];
    shl.b32 %r10, %r0, 4;
    cvt.u64.u32 %rd3, %r10;
    add.u64 %rd4, %rd0, %rd3;
    st.global.v4.u32 [%rd4], {%r5, %r6, %r8, %r9};
  )";
  struct alignas(16) Quad {
    uint32_t x[4];
  };
  for (Mode mode : kModes) {
    std::vector<Quad> out(4);
    KernelRunner runner(kernel(body, 1, 64));
    run_cluster(runner, 4, mode);
    runner.add(out);
    runner.run_ok();
    for (uint32_t i = 0; i < 4; ++i) {
      EXPECT_EQ(out[i].x[0], (i + 1) % 4 + 10);
      EXPECT_EQ(out[i].x[1], (i + 1) % 4);
      EXPECT_EQ(out[i].x[2], (i + 1) % 4 + 10);
      EXPECT_EQ(out[i].x[3], (i + 3) % 4 + 10);
    }
  }
}

TEST(Clusters, RemoteArrivalsAndAsynchronousStores) {
  // CTA 1 sends a value and an arrival to CTA 0, by st.async, red.async and mbarrier.arrive.
  const std::string body = std::string(R"(
    mov.u32 %r0, %cluster_ctarank;
    mbarrier.init.shared::cta.b64 [%r63], 2;
    st.shared.u32 [%r63+24], 100;
    fence.mbarrier_init.release.cluster;
  )") + kClusterSync + R"(
    setp.eq.u32 %p0, %r0, 0;
    @%p0 bra RECEIVE;
    mapa.shared::cluster.u32 %r1, %r63, 0;
    st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%r1+16], {41, 42}, [%r1];
    red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r1+24], 5, [%r1];
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r1];
    bra DONE;
  RECEIVE:
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r63], 12;
  WAIT:
    mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p1, [%r63], 0;
    @!%p1 bra WAIT;
    ld.shared.v2.u32 {%r2, %r3}, [%r63+16];
    ld.shared.u32 %r4, [%r63+24];
    st.global.v2.u32 [%rd0], {%r2, %r3};
    st.global.u32 [%rd0+8], %r4;
  DONE:
  )" + kClusterSync;
  for (Mode mode : kModes) {
    std::vector<uint32_t> out(4);
    KernelRunner runner(kernel(body, 1, 64));
    run_cluster(runner, 2, mode);
    runner.add(out);
    runner.run_ok();
    EXPECT_EQ(out[0], 41u) << name_of(mode);
    EXPECT_EQ(out[1], 42u);
    EXPECT_EQ(out[2], 105u);
  }
}

TEST(Clusters, BarrierMisuseIsReported) {
  KernelRunner twice(kernel("barrier.cluster.arrive;\nbarrier.cluster.arrive;\n", 0, 16));
  run_cluster(twice, 2, Mode::kEager);
  EXPECT_EQ(twice.run().kind, "barrier");
  KernelRunner wait(kernel("barrier.cluster.wait;\n", 0, 16));
  run_cluster(wait, 2, Mode::kEager);
  EXPECT_EQ(wait.run().kind, "barrier");
}

// Lanes that the guard leaves out arrive later than those that wait.
TEST(Clusters, LanesWaitInTurn) {
  const std::string body = R"(
    mov.u32 %r0, %tid.x;
    setp.lt.u32 %p0, %r0, 7;
    @%p0 barrier.cluster.arrive;
    @%p0 barrier.cluster.wait;
    @!%p0 barrier.cluster.arrive;
    @!%p0 barrier.cluster.wait;
  )";
  for (Mode mode : kModes) {
    KernelRunner runner(kernel(body, 0, 16));
    run_cluster(runner, 2, mode);
    runner.launch.block = {32, 1, 1};
    runner.run_ok();
  }
}

// Lane 0 is let go from behind a loop that the others spin in, and comes to the aligned barrier
// alone: it waits there for the other CTA, whose word it reads.
TEST(Clusters, AlignedBarriersOfLanesThatWereLetGo) {
  const std::string body = R"(
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %cluster_ctarank;
    xor.b32 %r2, %r1, 1;
    mapa.shared::cluster.u32 %r3, %r63, %r2;
    setp.eq.u32 %p0, %r0, 0;
    @%p0 st.shared.b32 [%r63+256], 0;
    bar.sync 0;
    @%p0 bra BEHIND;
  SPIN:
    ld.acquire.cta.shared.b32 %r4, [%r63+256];
    setp.eq.u32 %p1, %r4, 0;
    @%p1 bra SPIN;
  BEHIND:
    @%p0 st.release.cta.shared.b32 [%r63+256], 1;
    shl.b32 %r5, %r0, 2;
    add.u32 %r6, %r63, %r5;
    add.u32 %r7, %r3, %r5;
    mad.lo.u32 %r8, %r1, 100, %r0;
    st.shared.b32 [%r6], %r8;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    ld.shared::cluster.b32 %r9, [%r7];
    mad.lo.u32 %r10, %r1, 32, %r0;
    mul.wide.u32 %rd1, %r10, 4;
    add.u64 %rd1, %rd0, %rd1;
    st.global.u32 [%rd1], %r9;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
  )";
  for (Mode mode : kModes) {
    SCOPED_TRACE(name_of(mode));
    std::vector<uint32_t> out(64);
    KernelRunner runner(kernel(body, 1, 512));
    run_cluster(runner, 2, mode);
    runner.launch.block = {32, 1, 1};
    runner.add(out);
    runner.run_ok();
    for (uint32_t i = 0; i < 64; ++i) ASSERT_EQ(out[i], (i < 32 ? 100 : 0) + i % 32);
  }
}

TEST(Clusters, ExitedThreadsCountAsArrived) {
  const std::string body = R"(
    mov.u32 %r0, %cluster_ctarank;
    setp.eq.u32 %p0, %r0, 1;
    @%p0 ret;
    barrier.cluster.arrive;
    barrier.cluster.wait;
  )";
  KernelRunner runner(kernel(body, 0, 16));
  run_cluster(runner, 2, Mode::kEager);
  runner.launch.block = {64, 1, 1};
  runner.run_ok();
}

TEST(Clusters, AnAbsentCtaIsReported) {
  KernelRunner runner(kernel("mapa.shared::cluster.u32 %r1, %r63, 2;", 0, 16));
  run_cluster(runner, 2, Mode::kEager);
  EXPECT_EQ(runner.run().kind, "invalid_operand");
}

TEST(Clusters, SharedMemoryOfACtaThatHasExitedIsReported) {
  const std::string body = R"(
    mov.u32 %r0, %cluster_ctarank;
    setp.eq.u32 %p0, %r0, 0;
    @%p0 ret;
    mov.u32 %r5, 0;
  SPIN:
    add.u32 %r5, %r5, 1;
    setp.lt.u32 %p1, %r5, 100;
    @%p1 bra SPIN;
    mapa.shared::cluster.u32 %r1, %r63, 0;
    st.shared::cluster.u32 [%r1], 1;
  )";
  KernelRunner runner(kernel(body, 0, 16));
  run_cluster(runner, 2, Mode::kEager);
  const Report report = runner.run();
  EXPECT_EQ(report.kind, "out_of_bounds") << report.text;
}

TEST(Setmaxnreg, MovesRegistersBetweenWarpgroups) {
  const std::string body = R"(
    mov.u32 %r0, %tid.x;
    setp.lt.u32 %p0, %r0, 128;
    @%p0 bra GIVE;
    setmaxnreg.inc.sync.aligned.u32 160;
    ret;
  GIVE:
    setmaxnreg.dec.sync.aligned.u32 96;
  )";
  KernelRunner runner(kernel(body, 0, 16, ".maxnreg 128"));
  runner.launch.block = {256, 1, 1};
  runner.run_ok();
  // 256 threads would need 8192 more registers than the others gave.
  KernelRunner greedy(kernel(R"(
    mov.u32 %r0, %tid.x;
    setp.lt.u32 %p0, %r0, 128;
    @%p0 bra GIVE;
    setmaxnreg.inc.sync.aligned.u32 168;
    ret;
  GIVE:
    setmaxnreg.dec.sync.aligned.u32 96;
  )",
                             0, 16, ".maxnreg 128"));
  greedy.launch.block = {256, 1, 1};
  const Report report = greedy.run();
  EXPECT_EQ(report.kind, "deadlock");
  EXPECT_NE(report.text.find("setmaxnreg"), std::string::npos) << report.text;
}

TEST(Setmaxnreg, WrongDirectionIsReported) {
  KernelRunner runner(kernel("setmaxnreg.inc.sync.aligned.u32 96;", 0, 16, ".maxnreg 128"));
  runner.launch.block = {128, 1, 1};
  EXPECT_EQ(runner.run().kind, "invalid_operand");
}

// Each matrix i holds element (row, column) = i * 64 + row * 8 + column.
TEST(Stmatrix, StoresEveryShape) {
  for (int count : {1, 2, 4}) {
    for (bool transposed : {false, true}) {
      std::string body = R"(
        mov.u32 %r0, %laneid;
        shl.b32 %r1, %r0, 4;
        add.u32 %r1, %r63, %r1;
        shl.b32 %r2, %r0, 1;
        add.u32 %r3, %r2, 1;
        shl.b32 %r3, %r3, 16;
        or.b32 %r4, %r2, %r3;
      )";
      std::string registers;
      for (int i = 0; i < count; ++i) {
        const std::string r = "%r" + std::to_string(10 + i);
        body += "add.u32 " + r + ", %r4, " + std::to_string(i * 64 * 0x10001) + ";\n";
        registers += (i ? ", " : "") + r;
      }
      body += "stmatrix.sync.aligned.m8n8.x" + std::to_string(count) +
              (transposed ? ".trans" : "") + ".shared.b16 [%r1], {" + registers + "};\n";
      body += R"(
        bar.warp.sync -1;
        ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r1];
        shl.b32 %r9, %r0, 4;
        cvt.u64.u32 %rd1, %r9;
        add.u64 %rd0, %rd0, %rd1;
        st.global.v4.u32 [%rd0], {%r5, %r6, %r7, %r8};
      )";
      struct alignas(16) Row {
        uint16_t x[8];
      };
      std::vector<Row> out(32);
      KernelRunner runner(kernel(body, 1, 512));
      runner.launch.block = {32, 1, 1};
      runner.options.checks =
          exec::Checks::parse("all-undefined_store");  // rows that are not stored are read
      runner.add(out);
      runner.run_ok();
      for (int row = 0; row < 8 * count; ++row) {
        for (int column = 0; column < 8; ++column) {
          const int r = row % 8;
          const int expected = row / 8 * 64 + (transposed ? column * 8 + r : r * 8 + column);
          ASSERT_EQ(out[row].x[column], expected) << count << transposed << row << column;
        }
      }
    }
  }
}

TEST(Stmatrix, NeedsAWholeWarp) {
  KernelRunner runner(kernel("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r63], {%r10};", 0, 512));
  runner.launch.block = {16, 1, 1};
  const Report report = runner.run();
  EXPECT_EQ(report.kind, "divergence");
  EXPECT_NE(report.text.find("stmatrix by a warp of fewer lanes"), std::string::npos)
      << report.text;
}

}  // namespace
}  // namespace gpu_emulator
