#define FLASH_ATTN_ISA avx2
#define FLASH_ATTN_VECTOR_WIDTH 8
#include "layer_norm/cpu/bwd.h"
#include "layer_norm/cpu/fwd.h"
#include "layer_norm/cpu/kernels.h"

namespace flash::layer_norm::cpu {

const Kernels kernels_avx2 = {avx2::layer_norm_fwd, avx2::layer_norm_bwd};

}  // namespace flash::layer_norm::cpu
