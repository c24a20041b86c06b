#define FLASH_ATTN_ISA baseline
#define FLASH_ATTN_VECTOR_WIDTH 4
#include "xentropy/cpu/kernels.h"
#include "xentropy/cpu/xentropy.h"

namespace flash::xentropy::cpu {

const Kernels kernels_baseline = {baseline::xentropy_fwd, baseline::xentropy_bwd};

}  // namespace flash::xentropy::cpu
