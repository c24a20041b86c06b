#define FLASH_ATTN_ISA avx512
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "xentropy/cpu/kernels.h"
#include "xentropy/cpu/xentropy.h"

namespace flash::xentropy::cpu {

const Kernels kernels_avx512 = {avx512::xentropy_fwd, avx512::xentropy_bwd};

}  // namespace flash::xentropy::cpu
