#define FLASH_ATTN_ISA baseline
#define FLASH_ATTN_VECTOR_WIDTH 4
#include "layer_norm/cpu/bwd.h"
#include "layer_norm/cpu/fwd.h"
#include "layer_norm/cpu/kernels.h"

namespace flash::layer_norm::cpu {

const Kernels kernels_baseline = {baseline::layer_norm_fwd, baseline::layer_norm_bwd};

}  // namespace flash::layer_norm::cpu
