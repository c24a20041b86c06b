// What every instruction set's unit inlines (simd.h, vec_math.h, rows.h, tile_fma.h), behind
// function pointers. One instance for each instruction set, software included.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "common/flash.h"
#include "cpu/cpu_backend.h"
#include "isa_probe_table.h"

namespace flash_test {

// Those that this machine runs.
const std::vector<const IsaProbe*>& isa_probes();
const std::vector<const TileProbe*>& tile_probes();
const std::vector<const flash::cpu::Kernels*>& all_kernels();

// A test of this suite runs once for each.
class PerIsa : public testing::TestWithParam<const IsaProbe*> {
 protected:
  const IsaProbe& isa() const { return *GetParam(); }
};
inline std::string isa_name(const testing::TestParamInfo<const IsaProbe*>& info) {
  return info.param->name;
}

}  // namespace flash_test
