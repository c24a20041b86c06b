#define FLASH_ATTN_ISA baseline
#define FLASH_ATTN_VECTOR_WIDTH 4
#include "activations/cpu/activations.h"
#include "activations/cpu/kernels.h"

namespace flash::activations::cpu {

const Kernels kernels_baseline = {baseline::activation_fwd, baseline::activation_bwd};

}  // namespace flash::activations::cpu
