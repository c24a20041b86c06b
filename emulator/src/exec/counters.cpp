#include "counters.h"

#include <algorithm>
#include <cctype>

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

// "mma.m16n8k16.bf16" of the text "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {...".
std::string tensor_shape(std::string_view text) {
  const size_t begin = text.find("mma");
  if (begin == std::string_view::npos) return "";
  const bool grouped = begin >= 2 && text.compare(begin - 2, 2, "wg") == 0;
  std::string shape, types;
  size_t at = begin;
  while (at < text.size() && text[at] != ' ' && text[at] != '\t') {
    const size_t end = text.find_first_of(". \t", at + 1);
    const std::string_view word = text.substr(at, end - at);
    if (word.starts_with(".m") && word.size() > 2 && std::isdigit(word[2])) shape = word;
    if (word == ".bf16" || word == ".f16" || word == ".tf32" || word.starts_with(".e") ||
        word == ".s8" || word == ".u8") {
      if (types.find(word) == std::string::npos) types += word;
    }
    if (end == std::string_view::npos) break;
    at = end;
  }
  return (grouped ? "wgmma" : "mma") + shape + types;
}

}  // namespace

std::map<std::string, uint64_t> KernelCounters::tensor_shapes() const {
  std::map<std::string, uint64_t> shapes;
  for (const LineCounters& line : lines) {
    if (line.instruction_class != InstructionClass::kTensor || !line.executed) continue;
    const std::string shape = tensor_shape(line.text);
    if (shape.find(".m") != std::string::npos) shapes[shape] += line.executed;
  }
  return shapes;
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

bool same_lines(const std::vector<LineCounters>& a, const std::vector<LineCounters>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& x, const auto& y) {
    return x.line == y.line && x.text.data() == y.text.data();
  });
}

// Adds the lines of a launch of another module that has the kernel.
void merge_lines(std::vector<LineCounters>& to, const std::vector<LineCounters>& lines) {
  auto key = [](const LineCounters& line) { return std::pair(line.line, line.text); };
  std::map<std::pair<int, std::string_view>, size_t> at;
  for (size_t i = 0; i < to.size(); ++i) at[key(to[i])] = i;
  for (const LineCounters& line : lines) {
    const auto found = at.find(key(line));
    if (found == at.end()) {
      to.push_back(line);
    } else {
      to[found->second] += line;
    }
  }
  std::stable_sort(to.begin(), to.end(),
                   [](const auto& a, const auto& b) { return a.line < b.line; });
}

void add_kernel(KernelCounters& to, const KernelCounters& from) {
  const uint64_t launches = to.launches, ctas = to.ctas, warps = to.warps;
  std::vector<LineCounters> lines = std::move(to.lines);
  std::vector<std::shared_ptr<const SourceLines>> sources = std::move(to.sources);
  to = from;  // what describes the last launch
  to.launches += launches;
  to.ctas += ctas;
  to.warps += warps;
  if (same_lines(to.lines, lines)) {
    for (size_t i = 0; i < lines.size(); ++i) to.lines[i] += lines[i];
  } else if (!lines.empty()) {
    merge_lines(to.lines, lines);
  }
  for (const auto& source : sources) {
    if (std::find(to.sources.begin(), to.sources.end(), source) == to.sources.end()) {
      to.sources.push_back(source);
    }
  }
}

std::string quoted(std::string_view text) {
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
  for (const auto& [shape, count] : kernel.tensor_shapes()) {
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
    for (const auto& [shape, count] : kernel.tensor_shapes()) {
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
