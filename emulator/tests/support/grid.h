#pragma once

// Runs the body of a kernel on a grid; each thread gives one number.

#include <functional>
#include <string>
#include <vector>

#include "kernel_runner.h"

namespace gpu_emulator {

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

// A body of one CTA of 128 threads, and what its report says.
struct Misuse {
  const char *body, *kind, *text;
};

inline void expect_misuse(const Misuse& misuse) {
  SCOPED_TRACE(misuse.body);
  Grid grid;
  grid.grid = 1;
  const Report report = grid.run_body(misuse.body);
  EXPECT_EQ(report.kind, misuse.kind) << report.text;
  EXPECT_NE(report.text.find(misuse.text), std::string::npos) << report.text;
  EXPECT_NE(report.text.find("kernel k, CTA (0,0,0), warp"), std::string::npos) << report.text;
  EXPECT_NE(report.text.find("PTX line"), std::string::npos) << report.text;
  EXPECT_NE(report.cuda_error, 0);
}

}  // namespace gpu_emulator
