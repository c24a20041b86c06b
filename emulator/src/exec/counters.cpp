#include "counters.h"

#include <algorithm>
#include <cstring>

#include "occupancy.h"
#include "report.h"

namespace gpu_emulator {

const char* name_of(InstructionClass c) {
  constexpr const char* kNames[] = {"integer",    "float",   "convert",     "special function",
                                    "move",       "compare", "control",     "load",
                                    "store",      "atomic",  "matrix move", "tensor",
                                    "async copy", "barrier", "warp",        "other"};
  return kNames[static_cast<size_t>(c)];
}

uint64_t KernelCounters::warp_instructions() const {
  uint64_t sum = 0;
  for (const LineCounters& line : lines) sum += line.executed;
  return sum;
}

std::array<uint64_t, static_cast<size_t>(InstructionClass::kCount)> KernelCounters::by_class()
    const {
  std::array<uint64_t, static_cast<size_t>(InstructionClass::kCount)> sums{};
  for (const LineCounters& line : lines) {
    sums[static_cast<size_t>(line.instruction_class)] += line.executed;
  }
  return sums;
}

namespace {

void add_line(LineCounters& to, const LineCounters& from) {
  to.executed += from.executed;
  to.wavefronts += from.wavefronts;
  to.ideal_wavefronts += from.ideal_wavefronts;
  to.requests += from.requests;
  to.sectors += from.sectors;
  to.ideal_sectors += from.ideal_sectors;
  to.bytes += from.bytes;
}

void add_kernel(KernelCounters& to, const KernelCounters& from) {
  const uint64_t launches = to.launches, ctas = to.ctas, warps = to.warps;
  std::vector<LineCounters> lines = std::move(to.lines);
  std::map<std::string, uint64_t> shapes = std::move(to.tensor_shapes);
  to = from;  // what describes the last launch
  to.launches += launches;
  to.ctas += ctas;
  to.warps += warps;
  for (const auto& [shape, count] : shapes) to.tensor_shapes[shape] += count;
  // The same kernel has the same lines; a module loaded anew may not.
  auto key = [](const LineCounters& line) { return std::pair(line.line, line.text); };
  std::map<std::pair<int, std::string>, size_t> at;
  for (size_t i = 0; i < to.lines.size(); ++i) at[key(to.lines[i])] = i;
  for (const LineCounters& line : lines) {
    const auto found = at.find(key(line));
    if (found == at.end()) {
      to.lines.push_back(line);
    } else {
      add_line(to.lines[found->second], line);
    }
  }
  std::sort(to.lines.begin(), to.lines.end(),
            [](const auto& a, const auto& b) { return a.line < b.line; });
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) out += c;
  }
  return out + "\"";
}

using Number = unsigned long long;

// Sums over the lines for which `in` holds.
template <class In>
LineCounters sum_lines(const KernelCounters& kernel, In in) {
  LineCounters sum;
  for (const LineCounters& line : kernel.lines) {
    if (in(line)) add_line(sum, line);
  }
  return sum;
}

std::string line_json(const LineCounters& line) {
  std::string out = exec::format("{\"line\":%d,\"class\":\"%s\",\"executed\":%llu", line.line,
                                 name_of(line.instruction_class), Number{line.executed});
  if (line.wavefronts) {
    out += exec::format(",\"wavefronts\":%llu,\"ideal_wavefronts\":%llu", Number{line.wavefronts},
                        Number{line.ideal_wavefronts});
  }
  if (line.requests) {
    out += exec::format(",\"requests\":%llu,\"sectors\":%llu,\"ideal_sectors\":%llu",
                        Number{line.requests}, Number{line.sectors}, Number{line.ideal_sectors});
  }
  if (line.bytes) out += exec::format(",\"bytes\":%llu", Number{line.bytes});
  return out + ",\"text\":" + quoted(line.text) + "}";
}

std::string kernel_json(const KernelCounters& kernel) {
  const LineCounters all = sum_lines(kernel, [](const LineCounters&) { return true; });
  std::string out = exec::format(
      "{\"launches\":%llu,\"ctas\":%llu,\"warps\":%llu,\"warp_instructions\":%llu,\"classes\":{",
      Number{kernel.launches}, Number{kernel.ctas}, Number{kernel.warps},
      Number{kernel.warp_instructions()});
  const auto classes = kernel.by_class();
  for (size_t i = 0; i < classes.size(); ++i) {
    out += exec::format("%s\"%s\":%llu", i ? "," : "", name_of(static_cast<InstructionClass>(i)),
                        Number{classes[i]});
  }
  out += "},\"tensor\":{";
  const char* separator = "";
  for (const auto& [shape, count] : kernel.tensor_shapes) {
    out += separator + quoted(shape) + exec::format(":%llu", Number{count});
    separator = ",";
  }
  out += exec::format(
      "},\"shared\":{\"wavefronts\":%llu,\"ideal_wavefronts\":%llu},"
      "\"global\":{\"requests\":%llu,\"sectors\":%llu,\"ideal_sectors\":%llu},",
      Number{all.wavefronts}, Number{all.ideal_wavefronts}, Number{all.requests},
      Number{all.sectors}, Number{all.ideal_sectors});
  out += exec::format(
      "\"occupancy\":{\"ctas_per_sm\":%d,\"limit\":\"%s\",\"threads_per_cta\":%d,"
      "\"registers_per_thread\":%d,\"shared_bytes_per_cta\":%llu},\"lines\":[",
      kernel.ctas_per_sm, kernel.occupancy_limit.c_str(), kernel.threads_per_cta,
      kernel.registers_per_thread, Number{kernel.shared_bytes_per_cta});
  separator = "";
  for (const LineCounters& line : kernel.lines) {
    if (!line.executed) continue;
    out += separator + line_json(line);
    separator = ",";
  }
  return out + "]}";
}

}  // namespace

void Counters::add(const Counters& other) {
  for (const auto& [name, kernel] : other.kernels) add_kernel(kernels[name], kernel);
}

std::string Counters::json() const {
  std::string out = "{";
  for (const auto& [name, kernel] : kernels) {
    if (out.size() > 1) out += ",";
    out += quoted(name) + ":" + kernel_json(kernel);
  }
  return out + "}";
}

std::string Counters::table() const {
  std::string out;
  for (const auto& [name, kernel] : kernels) {
    const LineCounters all = sum_lines(kernel, [](const LineCounters&) { return true; });
    out += exec::format("%s: %llu launches, %llu CTAs, %llu warps\n", name.c_str(),
                        Number{kernel.launches}, Number{kernel.ctas}, Number{kernel.warps});
    out +=
        exec::format("  %-28s %14llu\n", "warp instructions", Number{kernel.warp_instructions()});
    const auto classes = kernel.by_class();
    for (size_t i = 0; i < classes.size(); ++i) {
      if (!classes[i]) continue;
      out += exec::format("    %-26s %14llu\n", name_of(static_cast<InstructionClass>(i)),
                          Number{classes[i]});
    }
    for (const auto& [shape, count] : kernel.tensor_shapes) {
      out += exec::format("  %-28s %14llu\n", shape.c_str(), Number{count});
    }
    out += exec::format("  %-28s %14llu of %llu without bank conflicts\n", "shared wavefronts",
                        Number{all.wavefronts}, Number{all.ideal_wavefronts});
    out += exec::format("  %-28s %14llu of %llu, in %llu requests\n", "global sectors",
                        Number{all.sectors}, Number{all.ideal_sectors}, Number{all.requests});
    out += exec::format(
        "  occupancy: %d CTAs per SM, limited by %s (%d threads, about %d registers "
        "a thread, %llu bytes of shared memory)\n",
        kernel.ctas_per_sm, kernel.occupancy_limit.c_str(), kernel.threads_per_cta,
        kernel.registers_per_thread, Number{kernel.shared_bytes_per_cta});
  }
  return out;
}

namespace exec {

Occupancy occupancy(const Arch& arch, const Function& entry, const std::array<uint32_t, 3>& block,
                    uint32_t dynamic_shared_bytes) {
  constexpr int kRegisterUnit = 256;  // registers are given to warps in such units
  constexpr int kMostRegisters = 255, kSharedUnit = 128, kReservedRegisters = 8;
  Occupancy fit;
  const int warps = static_cast<int>((block[0] * block[1] * block[2] + 31) / 32);
  int registers = std::min(entry.max_live_registers + kReservedRegisters, kMostRegisters);
  if (entry.max_registers) registers = std::min(registers, entry.max_registers);
  const int of_warp = (registers * 32 + kRegisterUnit - 1) / kRegisterUnit * kRegisterUnit;
  fit.registers_per_thread = of_warp / 32;
  fit.shared_bytes = (entry.shared_bytes + dynamic_shared_bytes + arch.reserved_shared_per_block +
                      kSharedUnit - 1) /
                     kSharedUnit * kSharedUnit;
  struct Bound {
    const char* what;
    int ctas;
  };
  const Bound bounds[] = {
      {"CTAs", arch.max_blocks_per_sm},
      {"threads", arch.max_threads_per_sm / (32 * warps)},
      {"registers", arch.registers_per_sm / (of_warp * warps)},
      {"shared memory", static_cast<int>(arch.shared_per_sm / fit.shared_bytes)}};
  fit.ctas_per_sm = bounds[0].ctas;
  fit.limit = bounds[0].what;
  for (const Bound& bound : bounds) {
    if (bound.ctas >= fit.ctas_per_sm) continue;
    fit.ctas_per_sm = bound.ctas;
    fit.limit = bound.what;
  }
  return fit;
}

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
                  const std::vector<PcCounters>& counted, KernelCounters& kernel) {
  for (size_t pc = 0; pc < function.code.size(); ++pc) {
    const PcCounters& from = counted[pc];
    if (!from.executed && !function.is_entry) continue;
    LineCounters line;
    line.line = function.lines[pc];
    line.text = line_text(program, line.line);
    line.instruction_class = function.code[pc].counter_class;
    line.executed = from.executed;
    line.wavefronts = from.wavefronts;
    line.ideal_wavefronts = from.ideal_wavefronts;
    line.requests = from.requests;
    line.sectors = from.sectors;
    line.ideal_sectors = from.ideal_sectors;
    line.bytes = from.bytes;
    if (line.instruction_class == InstructionClass::kTensor && line.executed) {
      const std::string shape = tensor_shape(line.text);
      if (shape.find(".m") != std::string::npos) kernel.tensor_shapes[shape] += line.executed;
    }
    kernel.lines.push_back(std::move(line));
  }
}

}  // namespace

void add_counters(const LaunchState& launch, const std::vector<Worker>& workers, uint64_t ctas,
                  const Occupancy& fit, Counters* counters) {
  const Program& program = *launch.launch->program;
  const auto& block = launch.launch->block;
  KernelCounters kernel;
  kernel.launches = 1;
  kernel.ctas = ctas;
  kernel.threads_per_cta = static_cast<int>(block[0] * block[1] * block[2]);
  kernel.warps = ctas * ((kernel.threads_per_cta + kWarpSize - 1) / kWarpSize);
  kernel.registers_per_thread = fit.registers_per_thread;
  kernel.shared_bytes_per_cta = fit.shared_bytes;
  kernel.ctas_per_sm = fit.ctas_per_sm;
  kernel.occupancy_limit = fit.limit;
  for (size_t f = 0; f < program.functions.size(); ++f) {
    const Function& function = program.functions[f];
    if (function.is_entry && &function != launch.entry) continue;
    std::vector<PcCounters> sum(function.code.size());
    for (const Worker& worker : workers) {
      for (size_t pc = 0; pc < sum.size(); ++pc) {
        const PcCounters& from = worker.counters[f][pc];
        sum[pc].executed += from.executed;
        sum[pc].wavefronts += from.wavefronts;
        sum[pc].ideal_wavefronts += from.ideal_wavefronts;
        sum[pc].requests += from.requests;
        sum[pc].sectors += from.sectors;
        sum[pc].ideal_sectors += from.ideal_sectors;
        sum[pc].bytes += from.bytes;
      }
    }
    add_function(program, function, sum, kernel);
  }
  Counters one;
  one.kernels[launch.entry->name] = std::move(kernel);
  counters->add(one);
}

}  // namespace exec
}  // namespace gpu_emulator
