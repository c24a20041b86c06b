#pragma once

// How many CTAs of a kernel fit on one multiprocessor at a time.

#include <cstdint>

#include "device.h"

namespace gpu_emulator {

struct Occupancy {
  int ctas_per_sm = 0;
  const char* limit = "";  // "threads", "CTAs", "registers", "shared memory"
};

// Shared memory that a CTA of this kernel takes: in units of 128 bytes, with the reserved part.
uint64_t allocated_shared(const Arch& arch, uint64_t shared_bytes_per_cta);

// Registers are allocated by the warp in units of 256 from the quarter of the register file that
// the warp runs on (CUDA C++ Programming Guide, "Multiprocessor Level"; cuda_occupancy.h of the
// toolkit).
// threads_per_cta: positive. registers_per_thread: 0 = not known, no limit.
Occupancy occupancy_of(const Arch& arch, int threads_per_cta, int registers_per_thread,
                       uint64_t shared_bytes_per_cta);

}  // namespace gpu_emulator
