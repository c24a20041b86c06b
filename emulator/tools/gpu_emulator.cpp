// gpu-emulator check KERNEL.ptx...
//
// Parses PTX files, lists the instructions that the emulator cannot execute and counts instructions
// by opcode. Exit status: 0 = everything is supported, 1 = something is not, 2 = a file cannot be
// read or parsed, or wrong usage.

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "exec/program.h"
#include "ptx/parser.h"

namespace {

namespace exec = gpu_emulator::exec;
namespace ptx = gpu_emulator::ptx;

constexpr int kSupported = 0, kUnsupported = 1, kError = 2;

void print_functions(const ptx::Module& module) {
  for (const ptx::Function& function : module.functions) {
    if (!function.has_body) continue;
    std::printf("  %s %s: %zu instructions, %zu registers named\n",
                function.is_entry ? ".entry" : ".func", function.name.c_str(), function.body.size(),
                function.registers.size());
  }
}

void print_opcodes(const ptx::Module& module) {
  std::map<std::string, size_t> count;
  for (const ptx::Function& function : module.functions) {
    for (const ptx::Instruction& instruction : function.body) ++count[instruction.opcode];
  }
  std::vector<std::pair<std::string, size_t>> sorted(count.begin(), count.end());
  std::stable_sort(sorted.begin(), sorted.end(),
                   [](const auto& a, const auto& b) { return a.second > b.second; });
  for (const auto& [opcode, number] : sorted) std::printf("  %8zu %s\n", number, opcode.c_str());
}

int check(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "%s: cannot be read\n", path);
    return kError;
  }
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  try {
    const ptx::Module module = ptx::parse(text);
    std::printf("%s: PTX %d.%d for %s\n", path, module.version_major, module.version_minor,
                module.target.c_str());
    print_functions(module);
    print_opcodes(module);
    const std::vector<std::string> unsupported = exec::unsupported(module);
    for (const std::string& form : unsupported) std::printf("  unsupported: %s\n", form.c_str());
    std::printf("  %zu unsupported instructions\n", unsupported.size());
    return unsupported.empty() ? kSupported : kUnsupported;
  } catch (const ptx::ParseError& error) {
    std::fprintf(stderr, "%s: %s\n", path, error.what());
    return kError;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3 || std::string_view(argv[1]) != "check") {
    std::fprintf(stderr, "usage: gpu-emulator check KERNEL.ptx...\n");
    return kError;
  }
  int status = kSupported;
  for (int i = 2; i < argc; ++i) status = std::max(status, check(argv[i]));
  return status;
}
