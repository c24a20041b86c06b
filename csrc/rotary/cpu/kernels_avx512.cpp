#define FLASH_ATTN_ISA avx512
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "rotary/cpu/rotary.h"

#include "rotary/cpu/kernels.h"

namespace flash::rotary::cpu {

const Kernels kernels_avx512 = {avx512::turn};

}  // namespace flash::rotary::cpu
