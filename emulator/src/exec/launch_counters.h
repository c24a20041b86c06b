#pragma once

#include <vector>

#include "../device/occupancy.h"
#include "scheduler.h"

namespace gpu_emulator::exec {

// CTAs of this launch that a multiprocessor holds at a time, by an estimate of its registers.
Occupancy occupancy_of(const LaunchState& launch);

// Adds what the workers counted in the launch, and its occupancy.
void add_counters(const LaunchState& launch, const std::vector<Worker>& workers,
                  Counters* counters);

}  // namespace gpu_emulator::exec
