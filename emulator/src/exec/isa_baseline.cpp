// The hot handlers for one instruction set; sources.cmake gives this file its flags.

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "isa_variants.h"
#include "warp.h"

#define GPU_EMULATOR_VECTOR_BYTES 16

namespace gpu_emulator::exec::isa_baseline {
namespace {

#include "lane_access.inc.h"
#include "lane_operations.inc.h"
#include "lanes.inc.h"
#include "matrix.inc.h"
#include "warpgroup.inc.h"

}  // namespace

const Isa& isa() {
  static constexpr Isa kIsa = {"baseline",  find_lanes,  find_matrix,
                               find_pack_a, find_pack_b, find_tile_product};
  return kIsa;
}

}  // namespace gpu_emulator::exec::isa_baseline
