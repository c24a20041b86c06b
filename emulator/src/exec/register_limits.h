#pragma once

// Registers of a thread, which ptxas decides and nobody has asked.

#include "../device/device.h"

namespace gpu_emulator::exec {

// Threads of a CTA by .reqntid or .maxntid; 0 = the kernel has neither.
int bound_threads(const Function& entry);

// The most that .maxnreg or the launch bounds leave a thread. threads_per_cta: of a kernel without
// launch bounds.
int register_limit(const Arch& arch, const Function& entry, int threads_per_cta);

// An estimate, from the registers alive at once.
int estimated_registers(const Arch& arch, const Function& entry);

}  // namespace gpu_emulator::exec
