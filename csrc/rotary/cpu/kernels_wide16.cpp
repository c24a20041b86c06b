#define FLASH_ATTN_ISA wide16
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "rotary/cpu/rotary.h"

#include "rotary/cpu/kernels.h"

namespace flash::rotary::cpu {

const Kernels kernels_wide16 = {wide16::turn};

}  // namespace flash::rotary::cpu
