#define FLASH_ATTN_ISA avx2
#define FLASH_ATTN_VECTOR_WIDTH 8
#include "rotary/cpu/rotary.h"

#include "rotary/cpu/kernels.h"

namespace flash::rotary::cpu {

const Kernels kernels_avx2 = {avx2::turn};

}  // namespace flash::rotary::cpu
