#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "warp.h"

namespace gpu_emulator::exec {

// A call of a function without a body that the CUDA runtime provides: vprintf, __assertfail.
// places: offsets of the arguments, then of the results, in each lane's local memory.
void run_system_call(Warp& warp, const std::string& name, const std::vector<uint64_t>& places,
                     uint32_t mask);

}  // namespace gpu_emulator::exec
