#include "occupancy.h"

#include <algorithm>

namespace gpu_emulator {
namespace {

constexpr int kWarp = 32, kQuarters = 4, kRegisterUnit = 256, kSharedUnit = 128;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

int64_t by_registers(const Arch& arch, int64_t warps, int registers_per_thread) {
  if (registers_per_thread <= 0) return INT32_MAX;
  const int64_t per_warp = round_up(int64_t{registers_per_thread} * kWarp, kRegisterUnit);
  if (round_up(warps, kQuarters) * per_warp > arch.registers_per_block) return 0;
  return arch.registers_per_sm / kQuarters / per_warp * kQuarters / warps;
}

int64_t by_shared(const Arch& arch, uint64_t bytes) {
  const int64_t limit = arch.shared_per_sm;
  if (bytes > static_cast<uint64_t>(limit)) return 0;
  const auto allocated = static_cast<int64_t>(allocated_shared(arch, bytes));
  return allocated > 0 ? limit / allocated : INT32_MAX;
}

}  // namespace

uint64_t allocated_shared(const Arch& arch, uint64_t bytes) {
  return static_cast<uint64_t>(
      round_up(static_cast<int64_t>(bytes) + arch.reserved_shared_per_block, kSharedUnit));
}

Occupancy occupancy_of(const Arch& arch, int threads_per_cta, int registers_per_thread,
                       uint64_t shared_bytes_per_cta) {
  const int64_t warps = round_up(threads_per_cta, kWarp) / kWarp;
  struct Limit {
    int64_t ctas;
    const char* name;
  };
  const Limit limits[] = {
      {arch.max_threads_per_sm / (warps * kWarp), "threads"},
      {arch.max_blocks_per_sm, "CTAs"},
      {by_registers(arch, warps, registers_per_thread), "registers"},
      {by_shared(arch, shared_bytes_per_cta), "shared memory"},
  };
  const Limit& tightest =
      *std::min_element(std::begin(limits), std::end(limits),
                        [](const Limit& a, const Limit& b) { return a.ctas < b.ctas; });
  return {static_cast<int>(tightest.ctas), tightest.name};
}

}  // namespace gpu_emulator
