#define FLASH_ATTN_ISA wide16
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "activations/cpu/activations.h"
#include "activations/cpu/kernels.h"

namespace flash::activations::cpu {

const Kernels kernels_wide16 = {wide16::activation_fwd, wide16::activation_bwd};

}  // namespace flash::activations::cpu
