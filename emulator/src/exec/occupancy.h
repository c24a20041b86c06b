#pragma once

// CTAs of a kernel that fit on a streaming multiprocessor, and what limits them.

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "../device/device.h"
#include "scheduler.h"

namespace gpu_emulator::exec {

struct Occupancy {
  int ctas_per_sm = 0;
  int registers_per_thread = 0;  // estimated from the PTX: registers alive at once
  uint64_t shared_bytes = 0;     // a CTA's, with the reserved part
  std::string limit;             // "registers", "shared memory", "threads", "CTAs"
};
Occupancy occupancy(const Arch& arch, const Function& entry, const std::array<uint32_t, 3>& block,
                    uint32_t dynamic_shared_bytes);

// Adds what the workers counted in one launch.
void add_counters(const LaunchState& launch, const std::vector<Worker>& workers, uint64_t ctas,
                  const Occupancy& fit, Counters* counters);

}  // namespace gpu_emulator::exec
