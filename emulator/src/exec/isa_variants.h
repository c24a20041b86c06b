#pragma once

#include "isa.h"

namespace gpu_emulator::exec {

namespace isa_baseline {
const Isa& isa();
}
namespace isa_avx2 {
const Isa& isa();
}
namespace isa_avx512 {
const Isa& isa();
}

}  // namespace gpu_emulator::exec
