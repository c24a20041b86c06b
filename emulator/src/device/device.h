#pragma once

// What a launch needs beside its program: the device's limits, its memory, its options. No
// process-wide state: two Devices know nothing of each other.

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <shared_mutex>
#include <string>
#include <vector>

#include "../exec/program.h"
#include "../exec/report_kinds.h"
#include "defined_bytes.h"

namespace gpu_emulator {

// Compute capability and limits: CUDA C++ Programming Guide, table "Technical Specifications".
struct Arch {
  std::string name;  // "NVIDIA A100-SXM4-80GB (emulated)"
  int major, minor;
  bool has_sm90a;  // wgmma, setmaxnreg, TMA
  int sm_count;
  int max_threads_per_block, max_threads_per_sm, max_blocks_per_sm, registers_per_sm,
      registers_per_block;
  int shared_per_block, shared_per_block_optin, shared_per_sm, reserved_shared_per_block;
  int max_cluster;  // CTAs; 1 = no clusters
  int l2_bytes;
  std::array<int, 3> max_block, max_grid;
};
// The boards that are emulated, by the number of their device. Of compute capability 12.0 there is
// what 8.9 has, not the instructions that came later.
inline constexpr int kBoards = 5;
const std::array<Arch, kBoards>& boards();  // A100, H100, RTX 3090, RTX 4090, RTX 5090
const Arch& a100();
const Arch& h100();

enum class Mode { kEager, kLate, kRandom };

struct Options {
  Mode mode = Mode::kEager;
  uint64_t seed = 0;  // of kRandom's schedule; 0 in the other modes = round robin
  exec::Checks checks = exec::Checks::all();
  bool count = true;
  int threads = 0;               // CPU threads that run CTAs; 0 = all
  int64_t max_instructions = 0;  // per warp; 0 = no limit
  // Launches execute the module with these texts in place of the lines of its PTX with these
  // numbers, from 1. For mutation tests: does the deletion of a synchronisation instruction show?
  std::map<int, std::string> replaced_lines;
  std::string delete_in;  // the kernel whose launches do; "": those of any
};

struct Report {        // why a launch failed; empty text = it did not
  int cuda_error = 0;  // CUresult
  std::string kind;    // "out_of_bounds", "race", "deadlock", ...: exec::ReportInfo::name
  std::string text;    // sentences with kernel, CTA, warp, lane, PTX line, source line
};

// Ranges of host memory that kernels may touch: allocations, registered host memory, module
// variables.
class MemoryMap {
 public:
  struct Range {
    uint64_t begin, end;
    bool readable, writable;
    std::string what;  // for reports: "allocation of 4096 bytes", "variable foo"
    std::shared_ptr<DefinedBytes> defined = nullptr;  // null: all of them
  };
  void add(const Range& range);
  bool remove(uint64_t begin);
  const Range* find(uint64_t address) const;  // nullptr = wild
  bool holds_undefined() const;               // some range may
  // After a launch that did not follow its writes: they may be anywhere.
  void assume_defined() const;

 private:
  mutable std::shared_mutex mutex_;
  std::map<uint64_t, Range> ranges_;
};

struct Launch {
  const exec::Program* program;  // decoded module
  int function;                  // index of the entry
  std::array<uint32_t, 3> grid, block, cluster;
  uint32_t dynamic_shared_bytes = 0;
  std::vector<std::byte> params;  // laid out as the entry's .param variables
  uint64_t module_base = 0;       // address of the module's global variables in device memory

  uint32_t threads_per_cta() const { return block[0] * block[1] * block[2]; }
};

// Runs the grid to its end on the calling thread and options.threads - 1 others. Counters of this
// launch are added to *counters.
Report run(const Arch& arch, const Options& options, const MemoryMap& memory, const Launch& launch,
           struct Counters* counters);

}  // namespace gpu_emulator
