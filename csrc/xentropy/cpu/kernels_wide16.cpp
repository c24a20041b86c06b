#define FLASH_ATTN_ISA wide16
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "xentropy/cpu/kernels.h"
#include "xentropy/cpu/xentropy.h"

namespace flash::xentropy::cpu {

const Kernels kernels_wide16 = {wide16::xentropy_fwd, wide16::xentropy_bwd};

}  // namespace flash::xentropy::cpu
