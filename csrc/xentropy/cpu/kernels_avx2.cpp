#define FLASH_ATTN_ISA avx2
#define FLASH_ATTN_VECTOR_WIDTH 8
#include "xentropy/cpu/kernels.h"
#include "xentropy/cpu/xentropy.h"

namespace flash::xentropy::cpu {

const Kernels kernels_avx2 = {avx2::xentropy_fwd, avx2::xentropy_bwd};

}  // namespace flash::xentropy::cpu
