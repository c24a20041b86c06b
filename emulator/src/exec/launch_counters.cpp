#include "launch_counters.h"

#include <cctype>
#include <string>
#include <utility>

#include "register_limits.h"

namespace gpu_emulator::exec {
namespace {

std::string line_text(const Program& program, int line) {
  if (line < 1 || static_cast<size_t>(line) > program.source_lines.size()) return "";
  const std::string& text = program.source_lines[line - 1];
  const size_t begin = text.find_first_not_of(" \t");
  return begin == std::string::npos ? "" : text.substr(begin);
}

// "mma.m16n8k16.bf16" of the text "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {...".
std::string tensor_shape(const std::string& text) {
  const size_t begin = text.find("mma");
  if (begin == std::string::npos) return "";
  const bool grouped = begin >= 2 && text.compare(begin - 2, 2, "wg") == 0;
  std::string shape, types;
  size_t at = begin;
  while (at < text.size() && text[at] != ' ' && text[at] != '\t') {
    const size_t end = text.find_first_of(". \t", at + 1);
    const std::string word = text.substr(at, end - at);
    if (word.starts_with(".m") && word.size() > 2 && std::isdigit(word[2])) shape = word;
    if (word == ".bf16" || word == ".f16" || word == ".tf32" || word.starts_with(".e") ||
        word == ".s8" || word == ".u8") {
      if (types.find(word) == std::string::npos) types += word;
    }
    if (end == std::string::npos) break;
    at = end;
  }
  return (grouped ? "wgmma" : "mma") + shape + types;
}

void add_function(const Program& program, const Function& function,
                  const std::vector<InstructionCounters>& counted, KernelCounters& kernel) {
  for (size_t pc = 0; pc < function.code.size(); ++pc) {
    if (!counted[pc].executed && !function.is_entry) continue;
    LineCounters line{counted[pc]};
    line.line = function.lines[pc];
    line.text = line_text(program, line.line);
    line.instruction_class = function.code[pc].counter_class;
    if (line.instruction_class == InstructionClass::kTensor && line.executed) {
      const std::string shape = tensor_shape(line.text);
      if (shape.find(".m") != std::string::npos) kernel.tensor_shapes[shape] += line.executed;
    }
    kernel.lines.push_back(std::move(line));
  }
}

}  // namespace

Occupancy occupancy_of(const LaunchState& launch) {
  return gpu_emulator::occupancy_of(
      *launch.arch, static_cast<int>(launch.launch->threads_per_cta()),
      estimated_registers(*launch.arch, *launch.entry), launch.shared_bytes);
}

void add_counters(const LaunchState& launch, const std::vector<Worker>& workers,
                  Counters* counters) {
  const Program& program = *launch.launch->program;
  const auto& grid = launch.launch->grid;
  const Occupancy occupancy = occupancy_of(launch);
  KernelCounters kernel;
  kernel.launches = 1;
  kernel.ctas = uint64_t{grid[0]} * grid[1] * grid[2];
  kernel.threads_per_cta = static_cast<int>(launch.launch->threads_per_cta());
  kernel.warps = kernel.ctas * ((kernel.threads_per_cta + kWarpSize - 1) / kWarpSize);
  kernel.registers_per_thread = estimated_registers(*launch.arch, *launch.entry);
  kernel.shared_bytes_per_cta = allocated_shared(*launch.arch, launch.shared_bytes);
  kernel.ctas_per_sm = occupancy.ctas_per_sm;
  kernel.occupancy_limit = occupancy.limit;
  for (size_t f = 0; f < program.functions.size(); ++f) {
    const Function& function = program.functions[f];
    if (function.is_entry && &function != launch.entry) continue;
    std::vector<InstructionCounters> sum(function.code.size());
    for (const Worker& worker : workers) {
      for (size_t pc = 0; pc < sum.size(); ++pc) sum[pc] += worker.counters[f][pc];
    }
    add_function(program, function, sum, kernel);
  }
  Counters one;
  one.kernels[launch.entry->name] = std::move(kernel);
  counters->add(one);
}

}  // namespace gpu_emulator::exec
