#pragma once

// Loading of PTX and fatbins, and finding kernels in them.

#include <cstddef>
#include <string>
#include <vector>

#include "driver.h"

namespace gpu_emulator::driver {

// The bytes of an image whose size only its contents tell: PTX text to its terminating zero, a
// fatbin, or the wrapper that nvcc puts around one. Fails with CUDA_ERROR_INVALID_IMAGE.
std::vector<std::byte> fetch_image(const void* image);

// Parses and decodes for the device and places the variables. Fails with CUDA_ERROR_INVALID_PTX,
// CUDA_ERROR_NO_BINARY_FOR_GPU, CUDA_ERROR_INVALID_IMAGE.
std::shared_ptr<Module> load_module(Driver& state, const std::vector<std::byte>& image);

// Index of the kernel in the module's program. Fails with CUDA_ERROR_NOT_FOUND.
int find_kernel(const Module& module, const std::string& name);

// The kernel in the current context, loaded there if need be.
CUfunction function_of_kernel(Driver& state, CUkernel handle);

}  // namespace gpu_emulator::driver
