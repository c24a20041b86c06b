#include "counters.h"

#include <algorithm>

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

InstructionCounters& InstructionCounters::operator+=(const InstructionCounters& other) {
  executed += other.executed;
  wavefronts += other.wavefronts;
  ideal_wavefronts += other.ideal_wavefronts;
  requests += other.requests;
  sectors += other.sectors;
  ideal_sectors += other.ideal_sectors;
  bytes += other.bytes;
  return *this;
}

namespace {

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
      to.lines[found->second] += line;
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

InstructionCounters sum_lines(const KernelCounters& kernel) {
  InstructionCounters sum;
  for (const LineCounters& line : kernel.lines) sum += line;
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
  const InstructionCounters all = sum_lines(kernel);
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
    const InstructionCounters all = sum_lines(kernel);
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

}  // namespace gpu_emulator
