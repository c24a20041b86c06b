// libFuzzer target: PTX text through the parser and the control-flow graph.

#include <cstddef>
#include <cstdint>

#include "ptx/cfg.h"
#include "ptx/parser.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  namespace ptx = gpu_emulator::ptx;
  try {
    const ptx::Module module = ptx::parse({reinterpret_cast<const char*>(data), size});
    for (const ptx::Function& function : module.functions) ptx::reconvergence_points(function);
  } catch (const ptx::ParseError&) {
  }
  return 0;
}
