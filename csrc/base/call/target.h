// Where a call runs, and running it on the emulated GPU.
#pragma once

#include <functional>
#include <span>

#include "base/target.h"
#include "base/tensor.h"

namespace flash {

// How sentences begin that turn down what needs CUDA kernels.
inline constexpr const char* kNoCudaKernels =
    "this build of flash_attn has no CUDA kernels (FLASH_ATTN_CUDA=PYPI pip install . makes one "
    "that has)";

// The target of a call whose tensors lie where x does. Throws ApiError(FLASH_ATTN_DEVICE_ERROR) if
// the device or its driver is not there.
Target target_of(const flash_attn_tensor& x, void* stream);

// Throws ApiError(FLASH_ATTN_UNSUPPORTED) unless this build has CUDA kernels, and the CUDA device
// `target` is one that they run on.
void require_cuda_kernels(const Target& target);

// Runs kernels on a target that is emulated. They see the tensors of the call and the workspace, to
// the byte, and no other host memory, and have finished when this returns.
void run_emulated(const Target& target, std::span<const Region> written,
                  std::span<const Region> read, const Workspace& workspace,
                  const std::function<void()>& kernels);

// Runs kernels on a CUDA target, emulated or not.
template <typename Launches>
void run_kernels(const Target& target, std::span<const Region> written,
                 std::span<const Region> read, const Workspace& workspace,
                 const Launches& launches) {
  if (!target.is_emulated) return launches();
  run_emulated(target, written, read, workspace, launches);
}

// Sends this thread's CPU tensors to the emulated GPU, or with nullptr or "" back to the CPU
// backend: flash_attn_use_emulator.
void use_emulator(const char* description, const char* library);

// flash_attn_emulator_counters.
std::string emulator_counters();

}  // namespace flash
