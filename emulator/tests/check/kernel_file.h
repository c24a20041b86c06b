#pragma once

// Kernels of this folder's faults/*.ptx: bodies with marks, from which a faulty kernel and its
// repaired twin are made.
//
//   // kind: race | deadlock                   what the faulty one must be reported as; where the
//                                              schedule decides, one of several
//   // modes: late random                    in which it is found; absent: all
//   // launch: grid 1 block 64 shared 1024 arch sm_80 cluster 1
//   bar.sync 0;             //-                only in the repaired twin
//   bar.sync 1;             //+                only in the faulty one
//   ld.shared.u32 %r10, [%r5];   //!           the report must name this line
//   bar.sync 2;             //?                ... this line or another one with this mark
//
// The body may use %r0 = %tid.x, %r1 = address of dynamic shared memory, %r2 = lane, %r3 = warp,
// %r4 = %ctaid.x, %r5 = %r1 + 4 * %tid.x, %rd0 = 4096 bytes to write (zero at first), %rd1 = 4096
// bytes to read, %rd2 = 4096 bytes that nobody has written, and registers from %r10, %rd10, %f0,
// %h0, %p0 on as it likes.

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "device/device.h"

namespace gpu_emulator::testing {

struct KernelFile {
  std::string name;
  std::string description;  // the first comment
  std::string kind;
  std::array<uint32_t, 3> grid{1, 1, 1}, block{32, 1, 1}, cluster{1, 1, 1};
  uint32_t shared_bytes = 0;
  bool hopper = false;
  std::string modes = "eager late random";  // that find the fault
  std::string faulty, repaired;             // PTX
  std::vector<int> lines;                   // of the faulty text, that the report must name
  std::vector<int> either_lines;            // of which it must name one
};

KernelFile read_kernel_file(const std::string& path);

struct Outcome {
  Report report;
  std::vector<uint32_t> output;  // 1024 words
};
Outcome run_kernel(const KernelFile& file, const std::string& ptx, const Options& options);

// The modes that find the file's fault.
std::vector<Options> modes_of(const KernelFile& file);

// Eager, late, and random schedules of several seeds, all checks on.
std::vector<Options> all_modes();
std::string name_of(const Options& options);

}  // namespace gpu_emulator::testing
