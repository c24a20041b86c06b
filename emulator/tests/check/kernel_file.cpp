#include "kernel_file.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <memory>
#include <sstream>
#include <stdexcept>

#include "exec/program.h"
#include "ptx/parser.h"

namespace gpu_emulator::testing {
namespace {

constexpr int kBufferBytes = 4096;

constexpr const char* kPrologue = R"(
.version 8.6
.target %s
.address_size 64
.extern .shared .align 1024 .b8 dynamic[];
.visible .entry kernel(.param .u64 p_out, .param .u64 p_in, .param .u64 p_fresh)
{
.reg .b16 %%h<40>;
.reg .b32 %%r<200>;
.reg .b64 %%rd<60>;
.reg .f32 %%f<60>;
.reg .pred %%p<20>;
ld.param.u64 %%rd0, [p_out];
ld.param.u64 %%rd1, [p_in];
ld.param.u64 %%rd2, [p_fresh];
mov.u32 %%r0, %%tid.x;
mov.u32 %%r1, dynamic;
and.b32 %%r2, %%r0, 31;
shr.u32 %%r3, %%r0, 5;
mov.u32 %%r4, %%ctaid.x;
shl.b32 %%r5, %%r0, 2;
add.u32 %%r5, %%r5, %%r1;
)";

std::string prologue(bool hopper) {
  char text[2048];
  std::snprintf(text, sizeof(text), kPrologue, hopper ? "sm_90a" : "sm_80");
  return text;
}

bool is_marked(const std::string& line, const char* mark) {
  const size_t comment = line.find("//");
  return comment != std::string::npos && line.find(mark, comment) == comment;
}

void read_launch(std::istringstream words, KernelFile& file) {
  std::string word;
  while (words >> word) {
    if (word == "grid") words >> file.grid[0];
    if (word == "block") words >> file.block[0];
    if (word == "shared") words >> file.shared_bytes;
    if (word == "cluster") words >> file.cluster[0];
    if (word == "arch") {
      words >> word;
      file.hopper = word == "sm_90a";
    }
  }
}

}  // namespace

KernelFile read_kernel_file(const std::string& path) {
  std::ifstream stream(path);
  if (!stream) throw std::runtime_error("cannot read " + path);
  KernelFile file;
  const size_t slash = path.find_last_of('/');
  file.name = path.substr(slash + 1, path.size() - slash - 5);
  std::vector<std::string> body;
  for (std::string line; std::getline(stream, line);) {
    if (line.starts_with("// kind: ")) {
      file.kind = line.substr(9);
    } else if (line.starts_with("// modes: ")) {
      file.modes = line.substr(10);
    } else if (line.starts_with("// launch: ")) {
      read_launch(std::istringstream(line.substr(11)), file);
    } else if (line.starts_with("//")) {
      file.description += line.substr(2);
    } else {
      body.push_back(line);
    }
  }
  file.faulty = file.repaired = prologue(file.hopper);
  int line_number = static_cast<int>(std::count(file.faulty.begin(), file.faulty.end(), '\n'));
  for (const std::string& line : body) {
    const bool repair = is_marked(line, "//-"), fault = is_marked(line, "//+");
    if (!fault) file.repaired += line + "\n";
    if (repair) continue;
    file.faulty += line + "\n";
    ++line_number;
    if (is_marked(line, "//!") || is_marked(line, "//+!")) file.lines.push_back(line_number);
    if (is_marked(line, "//?") || is_marked(line, "//+?")) file.either_lines.push_back(line_number);
  }
  file.faulty += "ret;\n}\n";
  file.repaired += "ret;\n}\n";
  return file;
}

Outcome run_kernel(const KernelFile& file, const std::string& ptx, const Options& options) {
  auto aligned = [](std::vector<std::byte>& storage) {
    const auto begin = reinterpret_cast<uintptr_t>(storage.data());
    return (begin + kBufferBytes - 1) / kBufferBytes * kBufferBytes;
  };
  std::vector<std::byte> output(2 * kBufferBytes), input(2 * kBufferBytes), fresh(2 * kBufferBytes);
  const uint64_t out = aligned(output), in = aligned(input), unwritten = aligned(fresh);
  for (int i = 0; i < kBufferBytes / 4; ++i) reinterpret_cast<uint32_t*>(in)[i] = 1000 + i;
  MemoryMap memory;
  memory.add({out, out + kBufferBytes, true, true, "output"});
  memory.add({in, in + kBufferBytes, true, false, "input"});
  memory.add({unwritten, unwritten + kBufferBytes, true, true, "fresh memory",
              std::make_shared<DefinedBytes>(unwritten, kBufferBytes)});
  const auto program = exec::decode(ptx::parse(ptx));
  Launch launch;
  launch.program = program.get();
  launch.function = program->find_function("kernel");
  launch.grid = file.grid;
  launch.block = file.block;
  launch.cluster = file.cluster;
  launch.dynamic_shared_bytes = file.shared_bytes;
  launch.params.resize(24);
  std::memcpy(launch.params.data(), &out, 8);
  std::memcpy(launch.params.data() + 8, &in, 8);
  std::memcpy(launch.params.data() + 16, &unwritten, 8);
  Outcome outcome;
  outcome.report = run(file.hopper ? h100() : a100(), options, memory, launch, nullptr);
  const auto* words = reinterpret_cast<const uint32_t*>(out);
  outcome.output.assign(words, words + kBufferBytes / 4);
  return outcome;
}

std::vector<Options> all_modes() {
  std::vector<Options> list;
  for (const Mode mode :
       {Mode::kEager, Mode::kLate, Mode::kRandom, Mode::kRandom, Mode::kRandom, Mode::kRandom}) {
    Options options;
    options.mode = mode;
    options.seed = mode == Mode::kRandom ? list.size() : 0;
    options.count = false;
    options.threads = 1;
    options.max_instructions = 1000000;
    list.push_back(options);
  }
  return list;
}

std::vector<Options> modes_of(const KernelFile& file) {
  std::vector<Options> list = all_modes();
  std::erase_if(list, [&](const Options& options) {
    const std::string name = name_of(options);
    return file.modes.find(name.substr(0, name.find(','))) == std::string::npos;
  });
  return list;
}

std::string name_of(const Options& options) {
  switch (options.mode) {
    case Mode::kEager:
      return "eager";
    case Mode::kLate:
      return "late";
    default:
      return "random, seed " + std::to_string(options.seed);
  }
}

}  // namespace gpu_emulator::testing
