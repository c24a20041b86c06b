#pragma once

// What a kernel needs of a multiprocessor, and its attributes.

#include "device/occupancy.h"
#include "driver.h"

namespace gpu_emulator::driver {

// The most threads a CTA of the kernel may have: .maxntid or .reqntid, at most the device's limit.
int max_threads_of(const Function& function, const Arch& arch);

// Dynamic shared memory that a launch may ask for.
uint64_t max_dynamic_shared_of(const Function& function, const Arch& arch);

// CTAs a multiprocessor holds; fails with CUDA_ERROR_INVALID_VALUE for block sizes below 1.
Occupancy occupancy_of(const Function& function, const Arch& arch, int threads,
                       uint64_t dynamic_shared_bytes);

int get_attribute(const Function& function, const Arch& arch, CUfunction_attribute attribute);
void set_attribute(Function& function, const Arch& arch, CUfunction_attribute attribute, int value);

}  // namespace gpu_emulator::driver
