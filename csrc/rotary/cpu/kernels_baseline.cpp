#define FLASH_ATTN_ISA baseline
#define FLASH_ATTN_VECTOR_WIDTH 4
#include "rotary/cpu/rotary.h"

#include "rotary/cpu/kernels.h"

namespace flash::rotary::cpu {

const Kernels kernels_baseline = {baseline::turn};

}  // namespace flash::rotary::cpu
