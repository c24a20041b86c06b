#pragma once

// Registers that may be read before they are written: definite assignment, a forward analysis over
// basic blocks.

#include <cstdint>
#include <vector>

#include "../exec/program.h"

namespace gpu_emulator::check {

// Words of Frame::undefined that are read on a path from the beginning without a write.
std::vector<uint32_t> unassigned_words(const exec::Function& function);

}  // namespace gpu_emulator::check
