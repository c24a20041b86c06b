#pragma once

// Launches: shapes, limits, parameters.

#include <array>
#include <cstdint>
#include <vector>

#include "driver.h"

namespace gpu_emulator::driver {

struct LaunchShape {
  std::array<uint32_t, 3> grid{}, block{}, cluster{1, 1, 1};
  uint32_t dynamic_shared = 0;  // bytes
  bool cooperative = false;

  uint64_t threads() const { return uint64_t{block[0]} * block[1] * block[2]; }
  uint64_t cluster_ctas() const { return uint64_t{cluster[0]} * cluster[1] * cluster[2]; }
};

// CTAs that a cluster of this kernel may have: 8, or all that the device can where the kernel
// allows sizes that are not portable.
int max_cluster_of(const Function& function, const Arch& arch);

// The configuration with its attributes, checked against the device and the kernel. Fails with the
// error that CUDA returns for the limit.
LaunchShape shape_of(const CUlaunchConfig& config, const Function& function, const Arch& arch);

// The parameter block, from the values that `params` points to or from `extra`.
std::vector<std::byte> parameters_of(const exec::Function& code, void** params, void** extra);

// What all launching entry points do.
void launch(Driver& state, const CUlaunchConfig& config, CUfunction handle, void** params,
            void** extra);

}  // namespace gpu_emulator::driver
