// libFuzzer target: bytes through the fatbin and the ELF reader.

#include <cstddef>
#include <cstdint>

#include "fatbin/fatbin.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  namespace fatbin = gpu_emulator::fatbin;
  const fatbin::Bytes bytes = std::as_bytes(std::span(data, size));
  for (const auto& [major, minor] : {std::pair{8, 0}, std::pair{9, 0}}) {
    try {
      fatbin::best_ptx(bytes, major, minor);
    } catch (const fatbin::FatbinError&) {
    }
  }
  try {
    fatbin::embedded_fatbins(bytes);
  } catch (const fatbin::FatbinError&) {
  }
  return 0;
}
