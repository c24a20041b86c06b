// mbarrier and cp.async.mbarrier.arrive in kernels.

#include "support/kernel_runner.h"

namespace gpu_emulator {
namespace {

// Thread 0 initialises an mbarrier at the beginning of shared memory with `count`.
std::string with_barrier(int count, const std::string& body) {
  return "mov.u32 %r62, %tid.x;\nsetp.ne.u32 %p7, %r62, 0;\n@%p7 bra READY;\n"
         "mbarrier.init.shared::cta.b64 [%r63], " +
         std::to_string(count) + ";\nREADY:\nbar.sync 0;\n" + body;
}

const char* kWaitForParity0 =
    "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 %p0, [%r63], 0;\n@!%p0 bra WAIT;\n";

void expect_report(const std::string& ptx, const std::string& kind, const std::string& words,
                   uint32_t threads = 32) {
  KernelRunner runner(ptx);
  runner.launch.block = {threads, 1, 1};
  const Report report = runner.run();
  EXPECT_EQ(report.kind, kind) << report.text;
  EXPECT_NE(report.text.find(words), std::string::npos) << report.text;
}

TEST(Mbarriers, OrdersAWarpAfterAnother) {
  // Warp 1 stores and arrives; warp 0 waits and reads.
  const std::string body = with_barrier(32, R"(
    shr.u32 %r0, %r62, 5;
    and.b32 %r1, %r62, 31;
    shl.b32 %r2, %r1, 2;
    add.u32 %r3, %r63, %r2;
    setp.eq.u32 %p1, %r0, 0;
    @%p1 bra READER;
    mul.lo.u32 %r4, %r1, 3;
    st.shared.u32 [%r3+64], %r4;
    mbarrier.arrive.shared::cta.b64 _, [%r63];
    ret;
  READER:
  )") + kWaitForParity0 + R"(
    ld.shared.u32 %r5, [%r3+64];
    cvt.u64.u32 %rd1, %r2;
    add.u64 %rd0, %rd0, %rd1;
    st.global.u32 [%rd0], %r5;
  )";
  for (Mode mode : kModes) {
    std::vector<uint32_t> out(32);
    KernelRunner runner(kernel(body, 1, 1024));
    runner.launch.block = {64, 1, 1};
    runner.options.mode = mode;
    runner.add(out);
    runner.run_ok();
    for (uint32_t i = 0; i < 32; ++i) EXPECT_EQ(out[i], 3 * i);
  }
}

TEST(Mbarriers, StatesAndPendingCount) {
  const std::string body = with_barrier(3, R"(
    mbarrier.arrive.noComplete.shared::cta.b64 %rd1, [%r63], 2;
    mbarrier.pending_count.b64 %r0, %rd1;
    mbarrier.test_wait.shared::cta.b64 %p0, [%r63], %rd1;
    selp.u32 %r1, 1, 0, %p0;
    mbarrier.arrive.shared::cta.b64 %rd2, [%r63], 1;
    mbarrier.pending_count.b64 %r2, %rd2;
    mbarrier.test_wait.shared::cta.b64 %p0, [%r63], %rd2;
    selp.u32 %r3, 1, 0, %p0;
    mbarrier.arrive_drop.shared::cta.b64 %rd3, [%r63];
    mbarrier.arrive.shared::cta.b64 _, [%r63], 2;
    mbarrier.arrive.shared::cta.b64 %rd4, [%r63];
    mbarrier.pending_count.b64 %r4, %rd4;
    st.global.v4.u32 [%rd0], {%r0, %r1, %r2, %r3};
    st.global.u32 [%rd0+16], %r4;
  )");
  std::vector<uint32_t> out(5);
  KernelRunner runner(kernel(body, 1, 64));
  runner.add(out);
  runner.run_ok();
  // Arrivals pending before each arrive; the first phase ends with the second; a dropped arrival is
  // missing in the third.
  EXPECT_EQ(out, (std::vector<uint32_t>{3, 0, 1, 1, 2}));
}

TEST(Mbarriers, TransactionsCount) {
  const std::string body = with_barrier(1, R"(
    mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r63], 48;
    mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r63], 16;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r63], 64;
    mbarrier.test_wait.parity.shared::cta.b64 %p0, [%r63], 0;
    selp.u32 %r0, 1, 0, %p0;
    mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r63], 32;
    mbarrier.test_wait.parity.shared::cta.b64 %p0, [%r63], 0;
    selp.u32 %r1, 1, 0, %p0;
    st.global.v2.u32 [%rd0], {%r0, %r1};
  )");
  std::vector<uint32_t> out(2);
  KernelRunner runner(kernel(body, 1, 64));
  runner.add(out);
  runner.run_ok();
  EXPECT_EQ(out, (std::vector<uint32_t>{0, 1}));
}

TEST(Mbarriers, GenericAddressesAndReinitialisation) {
  const std::string body = with_barrier(1, R"(
    cvta.shared.u64 %rd1, smem;
    mbarrier.arrive.b64 %rd2, [%rd1];
    mbarrier.inval.b64 [%rd1];
    mbarrier.init.b64 [%rd1], 5;
    mbarrier.arrive.b64 %rd2, [%rd1+0];
    mbarrier.pending_count.b64 %r0, %rd2;
    st.global.u32 [%rd0], %r0;
  )");
  std::vector<uint32_t> out(1);
  KernelRunner runner(kernel(body, 1, 64));
  runner.add(out);
  runner.run_ok();
  EXPECT_EQ(out[0], 5u);
}

TEST(Mbarriers, CopiesArrive) {
  // Each lane copies 4 bytes; the barrier expects 32 arrivals of completed copies.
  const std::string body = with_barrier(32, R"(
    shl.b32 %r1, %r62, 2;
    cvt.u64.u32 %rd2, %r1;
    add.u64 %rd3, %rd1, %rd2;
    add.u64 %rd4, %rd0, %rd2;
    add.u32 %r2, %r63, %r1;
    cp.async.ca.shared.global [%r2+64], [%rd3], 4;
    cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r63];
  )") + kWaitForParity0 + R"(
    xor.b32 %r3, %r1, 4;
    add.u32 %r3, %r63, %r3;
    ld.shared.u32 %r4, [%r3+64];
    st.global.u32 [%rd4], %r4;
  )";
  for (Mode mode : kModes) {
    std::vector<uint32_t> out(32), in(32);
    for (uint32_t i = 0; i < 32; ++i) in[i] = i * i;
    KernelRunner runner(kernel(body, 2, 1024));
    runner.launch.block = {32, 1, 1};
    runner.options.mode = mode;
    runner.add(out);
    runner.add(in);
    runner.run_ok();
    for (uint32_t i = 0; i < 32; ++i) EXPECT_EQ(out[i], in[i ^ 1]) << name_of(mode);
  }
}

TEST(Mbarriers, IncrementingArrivalKeepsTheCount) {
  // Without .noinc the arrival adds itself: the phase ends with the one ordinary arrival, after it.
  const std::string body = with_barrier(1, R"(
    cp.async.ca.shared.global [%r63+64], [%rd1], 16;
    cp.async.mbarrier.arrive.shared::cta.b64 [%r63];
    mbarrier.arrive.shared::cta.b64 _, [%r63];
  )") + kWaitForParity0 + "ld.shared.u32 %r0, [%r63+76];\nst.global.u32 [%rd0], %r0;\n";
  for (Mode mode : kModes) {
    std::vector<uint32_t> out(1), in = {1, 2, 3, 4};
    KernelRunner runner(kernel(body, 2, 128));
    runner.options.mode = mode;
    runner.add(out);
    runner.map_memory(reinterpret_cast<uint64_t>(in.data()), 16);
    runner.argument(reinterpret_cast<uint64_t>(in.data()));
    const Report report = runner.run();
    // 16-byte alignment of a vector's memory is the allocator's promise.
    EXPECT_EQ(report.text, "");
    EXPECT_EQ(out[0], 4u);
  }
}

TEST(Mbarriers, MisuseIsReported) {
  const std::string misuse = "mbarrier";
  expect_report(kernel("mbarrier.arrive.shared::cta.b64 _, [%r63];", 0, 64), misuse,
                "not initialised", 1);
  expect_report(kernel("mbarrier.init.shared::cta.b64 [%r63], 0;", 0, 64), misuse, "2^20", 1);
  expect_report(kernel("mbarrier.init.shared::cta.b64 [%r63], 1;\n"
                       "mbarrier.init.shared::cta.b64 [%r63], 1;",
                       0, 64),
                "mbarrier_again", "initialised already", 1);
  expect_report(kernel(with_barrier(3, "mbarrier.arrive.shared::cta.b64 _, [%r63], 4;"), 0, 64),
                misuse, "more arrivals", 1);
  expect_report(
      kernel(with_barrier(1, "mbarrier.arrive.noComplete.shared::cta.b64 %rd0, [%r63], 1;"), 0, 64),
      misuse, "noComplete", 1);
  expect_report(kernel(with_barrier(1,
                                    "st.shared.u32 [%r63], 7;\n"
                                    "mbarrier.arrive.shared::cta.b64 _, [%r63];"),
                       0, 64),
                misuse, "overwritten", 1);
  expect_report(kernel("mbarrier.init.shared::cta.b64 [%r63+4], 1;", 0, 64), "misaligned",
                "Misaligned", 1);
  // A state two phases old.
  expect_report(kernel(with_barrier(1, R"(
    mbarrier.arrive.shared::cta.b64 %rd0, [%r63];
    mbarrier.arrive.shared::cta.b64 _, [%r63];
    mbarrier.test_wait.shared::cta.b64 %p0, [%r63], %rd0;
  )"),
                       0, 64),
                misuse, "preceding phase", 1);
}

TEST(Mbarriers, AWaitForNothingIsADeadlock) {
  expect_report(kernel(with_barrier(2, "mbarrier.arrive.shared::cta.b64 _, [%r63];\n" +
                                           std::string(kWaitForParity0)),
                       0, 64),
                "deadlock", "mbarrier", 1);
}

TEST(Mbarriers, LookingDoesNotBlock) {
  // A thread that looks before it completes the phase itself.
  const std::string body = with_barrier(1, R"(
    mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r63], 0, 1000;
    selp.u32 %r0, 1, 0, %p0;
    mbarrier.arrive.shared::cta.b64 _, [%r63];
  )") + kWaitForParity0 + "st.global.u32 [%rd0], %r0;\n";
  std::vector<uint32_t> out = {7};
  KernelRunner runner(kernel(body, 1, 64));
  runner.add(out);
  runner.run_ok();
  EXPECT_EQ(out[0], 0u);
}

}  // namespace
}  // namespace gpu_emulator
