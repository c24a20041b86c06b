// What every instruction set's unit inlines (simd.h, vec_math.h, rows.h, tile_fma.h), behind
// function pointers. Instances: those of the library, and wide16, vectors of 16 floats compiled for
// AVX2, which runs the code of the widest vectors on machines without AVX-512.
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
