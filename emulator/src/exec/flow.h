#pragma once

#include "../ptx/module.h"
#include "program.h"

namespace gpu_emulator::exec {

// Sets how undefined values go through an instruction: Effects::flow, bits, ends_flow.
void set_flow(const ptx::Instruction& ast, Effects& effects);

}  // namespace gpu_emulator::exec
