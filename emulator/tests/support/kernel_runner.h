#pragma once

// Runs kernels given as PTX text on the emulated H100.

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device/device.h"
#include "exec/counters.h"
#include "exec/program.h"
#include "ptx/parser.h"

namespace gpu_emulator {

// The body of a kernel `k` with 64-bit parameters p0, p1, ..., each loaded into %rd0, %rd1, ...
// Registers: %r<64> and %rd<64> and %f<64> (bits), %p<8>, %h<8> (16 bits). .shared `smem` of
// `shared` bytes, 1024-byte aligned; %r63 is its address.
inline std::string kernel(const std::string& body, int params, int shared = 0,
                          const std::string& directives = "") {
  std::string text = ".version 8.6\n.target sm_90a\n.address_size 64\n.visible .entry k(";
  for (int i = 0; i < params; ++i) {
    text += std::string(i ? ", " : "") + ".param .u64 p" + std::to_string(i);
  }
  text += ")\n" + directives + "\n{\n";
  text += ".reg .b32 %r<64>;\n.reg .b64 %rd<64>;\n.reg .f32 %f<64>;\n.reg .pred %p<8>;\n";
  text += ".reg .b16 %h<8>;\n";
  if (shared) {
    text += ".shared .align 1024 .b8 smem[" + std::to_string(shared) + "];\n";
    text += "mov.u32 %r63, smem;\n";
  }
  for (int i = 0; i < params; ++i) {
    const std::string n = std::to_string(i);
    text += "ld.param.u64 %rd" + n + ", [p" + n + "];\n";
  }
  return text + body + "\nret;\n}\n";
}

class KernelRunner {
 public:
  explicit KernelRunner(const std::string& ptx, const exec::Isa* isa = nullptr)
      : module_(ptx::parse(ptx)), program_(exec::decode(module_, isa)) {
    launch.program = program_.get();
    launch.function = 0;
    while (!program_->functions[launch.function].is_entry) ++launch.function;
    launch.grid = launch.block = launch.cluster = {1, 1, 1};
    options.threads = 1;
  }

  template <class T>
  void add(std::vector<T>& memory) {
    const auto begin = reinterpret_cast<uint64_t>(memory.data());
    memory_.add({begin, begin + memory.size() * sizeof(T), true, true, "test memory"});
    argument(begin);
  }
  void argument(uint64_t value) {
    const size_t at = launch.params.size();
    launch.params.resize(at + 8);
    std::memcpy(launch.params.data() + at, &value, 8);
  }
  // A parameter of any size, aligned to 64 bytes.
  template <class T>
  void argument_bytes(const T& value) {
    const size_t at = (launch.params.size() + 63) / 64 * 64;
    launch.params.resize(at + sizeof(T));
    std::memcpy(launch.params.data() + at, &value, sizeof(T));
  }
  void map_memory(uint64_t begin, uint64_t bytes, std::shared_ptr<DefinedBytes> defined = nullptr) {
    memory_.add({begin, begin + bytes, true, true, "test memory", std::move(defined)});
  }

  const exec::Program& program() const { return *program_; }
  Report run() { return gpu_emulator::run(h100(), options, memory_, launch, &counters); }
  void run_ok() {
    const Report report = run();
    EXPECT_EQ(report.text, "");
  }

  Launch launch;
  Options options;
  Counters counters;

 private:
  ptx::Module module_;
  std::unique_ptr<exec::Program> program_;
  MemoryMap memory_;
};

inline const Mode kModes[] = {Mode::kEager, Mode::kLate, Mode::kRandom};
inline const char* name_of(Mode mode) {
  return mode == Mode::kEager ? "eager" : mode == Mode::kLate ? "late" : "random";
}

}  // namespace gpu_emulator
