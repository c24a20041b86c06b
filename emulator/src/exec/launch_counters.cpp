#include "launch_counters.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "register_limits.h"

namespace gpu_emulator::exec {
namespace {

std::string_view line_text(const Program& program, int line) {
  if (line < 1 || static_cast<size_t>(line) > program.source_lines->size()) return "";
  const std::string_view text = (*program.source_lines)[line - 1];
  const size_t begin = text.find_first_not_of(" \t");
  return begin == std::string_view::npos ? "" : text.substr(begin);
}

void add_function(const Program& program, const Function& function,
                  const std::vector<InstructionCounters>& counted, KernelCounters& kernel) {
  for (size_t pc = 0; pc < function.code.size(); ++pc) {
    if (!counted[pc].executed && !function.is_entry) continue;
    LineCounters line{counted[pc]};
    line.line = function.lines[pc];
    line.text = line_text(program, line.line);
    line.instruction_class = function.code[pc].counter_class;
    kernel.lines.push_back(line);
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
  kernel.sources = {program.source_lines};
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
  std::stable_sort(kernel.lines.begin(), kernel.lines.end(),
                   [](const auto& a, const auto& b) { return a.line < b.line; });
  Counters one;
  one.kernels[launch.entry->name] = std::move(kernel);
  counters->add(one);
}

}  // namespace gpu_emulator::exec
