#include "register_limits.h"

#include <algorithm>
#include <cstdint>

namespace gpu_emulator::exec {
namespace {

constexpr int kMost = 255, kStep = 8;

int product(const int (&size)[3]) {
  if (size[0] == 0) return 0;
  const int64_t all = int64_t{size[0]} * std::max(size[1], 1) * std::max(size[2], 1);
  return static_cast<int>(std::min<int64_t>(all, INT32_MAX));
}

}  // namespace

int bound_threads(const Function& entry) {
  const int required = product(entry.required_threads);
  return required > 0 ? required : product(entry.max_threads);
}

int register_limit(const Arch& arch, const Function& entry, int threads_per_cta) {
  if (entry.max_registers > 0) return std::min(entry.max_registers, kMost);
  const int bound = bound_threads(entry);
  const int64_t threads = bound > 0 ? bound : threads_per_cta;
  const int64_t fit = arch.registers_per_sm / (threads * std::max(entry.min_ctas_per_sm, 1));
  return static_cast<int>(std::clamp<int64_t>(fit / kStep * kStep, kStep, kMost));
}

int estimated_registers(const Arch& arch, const Function& entry) {
  constexpr int kOverhead = 8;  // addresses and constants that PTX does not hold in registers
  return std::min(entry.max_live_registers + kOverhead, register_limit(arch, entry, 1));
}

}  // namespace gpu_emulator::exec
