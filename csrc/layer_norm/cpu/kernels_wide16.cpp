#define FLASH_ATTN_ISA wide16
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "layer_norm/cpu/bwd.h"
#include "layer_norm/cpu/fwd.h"
#include "layer_norm/cpu/kernels.h"

namespace flash::layer_norm::cpu {

const Kernels kernels_wide16 = {wide16::layer_norm_fwd, wide16::layer_norm_bwd};

}  // namespace flash::layer_norm::cpu
