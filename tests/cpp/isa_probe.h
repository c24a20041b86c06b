// What every instruction set's unit inlines (simd.h, vec_math.h, rows.h, tile_fma.h), behind
// function pointers. Instances: those of the library, and some compiled for AVX2 that run the code
// of other machines: wide16, vectors of 16 floats; soft_dot and soft_tiles, the loops over bf16
// products with AVX-512-BF16's or AMX's instructions in software.
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
