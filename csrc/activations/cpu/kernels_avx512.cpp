#define FLASH_ATTN_ISA avx512
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "activations/cpu/activations.h"
#include "activations/cpu/kernels.h"

namespace flash::activations::cpu {

const Kernels kernels_avx512 = {avx512::activation_fwd, avx512::activation_bwd};

}  // namespace flash::activations::cpu
